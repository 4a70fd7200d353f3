"""Models: loading, stored parameters, function-preserving interventions."""
