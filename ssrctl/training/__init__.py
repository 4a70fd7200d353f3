"""Training: the training step, step gradients, updaters, observers."""
