"""Evaluation: accuracy and intervals."""
