"""Files: records, artifacts, deltas, checkpoints, manifests."""
