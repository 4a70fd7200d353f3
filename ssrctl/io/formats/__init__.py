"""Formats of responses and labelled solutions that other tools write, one per file."""
