"""SSR eq. 4-9 over padded numpy arrays, NaN where there is no step or no score."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

EPS = 1e-8
#: where a standard deviation is below this, there is no signal
MIN_STD = 1e-6


def padded(rewards: Sequence[Sequence[float | None]]) -> np.ndarray:
    """float64 ``[G, T]``."""
    longest = max((len(row) for row in rewards), default=0)
    out = np.full((len(rewards), longest), np.nan)
    for j, row in enumerate(rewards):
        for i, value in enumerate(row):
            if value is not None:
                out[j, i] = value
    return out


def group(r: np.ndarray) -> np.ndarray:
    """Eq. 4-6."""
    if np.isnan(r).all():
        return r
    mu, sigma = np.nanmean(r), np.nanstd(r)
    return np.where(np.isnan(r), np.nan, (r - mu) / (sigma + EPS) if sigma >= MIN_STD else 0.0)


def final(r: np.ndarray) -> np.ndarray:
    """Eq. 7-9."""
    a = group(r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means over responses without any score
        mu, sigma = np.nanmean(a, axis=1, keepdims=True), np.nanstd(a, axis=1, keepdims=True)
    return np.where(np.isnan(a), np.nan, np.where(sigma >= MIN_STD, (a - mu) / (sigma + EPS), 0.0))
