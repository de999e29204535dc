"""Tasks: questions, graders, and scores with confidence intervals."""
