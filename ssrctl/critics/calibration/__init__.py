"""Calibration: measure a critic on solutions whose first wrong step is known."""
