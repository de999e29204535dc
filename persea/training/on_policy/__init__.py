"""On-policy distillation: rollouts and their scores by teachers."""
