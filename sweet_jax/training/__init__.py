"""The training step, and the loop, checkpoints, logs and device placement around it."""
