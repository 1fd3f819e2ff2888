"""Training: losses, optimizer, step, checkpoints, loop."""
