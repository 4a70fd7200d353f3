"""Tensor maths: masks, selection, budgets, advantages, losses, KronosOpt.

Imports torch and the standard library only.
"""
