"""Models: loading, rollouts, gradients, and the bundled reasoner."""
