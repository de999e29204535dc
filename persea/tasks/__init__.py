"""Tasks: questions, graders, scores with confidence intervals."""
