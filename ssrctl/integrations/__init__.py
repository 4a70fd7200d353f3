"""Parts for other trainers."""
