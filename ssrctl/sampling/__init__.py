"""Sampling: generation, groups, token alignment, continuations."""
