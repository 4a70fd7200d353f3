"""Masks: superweights, static masks, and the budget profile."""
