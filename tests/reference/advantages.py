"""SSR eq. 4-9 in numpy, with a missing score as NaN."""

import numpy as np


def _z(values, mean, std):
    # Below 1e-6 a deviation is round-off and carries no signal.
    return np.where(np.isnan(values), np.nan, 0.0) if not std >= 1e-6 else (values - mean) / (std + 1e-8)


def _statistics(values):
    known = values[~np.isnan(values)]
    return (known.mean(), known.std(ddof=0)) if known.size else (0.0, 0.0)


def group(rewards):
    """Eq. 4-6: all step rewards of the group, flattened."""
    rows = [np.array([np.nan if r is None else r for r in row], dtype=np.float64) for row in rewards]
    mean, std = _statistics(np.concatenate([np.empty(0), *rows]))
    return [_z(row, mean, std) for row in rows]


def paper(rewards):
    """Eq. 7-9 on top of eq. 6."""
    return [_z(row, *_statistics(row)) for row in group(rewards)]
