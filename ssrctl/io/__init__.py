"""Files, jsonl, records, artifacts, manifests, console output."""
