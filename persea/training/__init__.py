"""Train the student: dataset, loop, checkpoints, loss balancing."""
