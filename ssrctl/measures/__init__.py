"""Measures that `ssrctl diagnose` takes, one module per family."""
