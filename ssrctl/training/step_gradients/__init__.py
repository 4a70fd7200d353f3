"""The methods to compute the gradient of each update unit's loss, one module each (see ``training.unit_gradients``)."""
