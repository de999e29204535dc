"""Training of the student: dataset, loop, checkpoints, loss balancing, on-policy steps."""
