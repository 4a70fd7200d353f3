"""Checkpoints: reading, tensor names, deltas, fingerprints, run directories."""
