"""Maths that several measures share."""
