"""Slow, independent implementations to compare with: loops, sorting and numpy, from the papers' formulas."""
