"""Several processes on one job: launching, agreement, dealing, and the exchange of kept gradients."""
