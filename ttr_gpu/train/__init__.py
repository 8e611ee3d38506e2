"""Training: configuration, optimizer, the loop, checkpoints, and what a run leaves behind."""
