"""What `ssrctl diagnose` measures, one module per family of measures."""
