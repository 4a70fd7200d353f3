"""Tensor maths only: masks, selection, budgets, advantages, losses, KronosOpt. Imports torch alone."""
