"""A warning when the engine's log-probabilities are farther from the trainer's than rounding explains."""

from __future__ import annotations

from typing import Any

import torch

from ssrctl.io import console
from ssrctl.sampling.engines.probe import gap_bound


class GapWarning:
    """The bound on ``logprob_gap_mean`` by the dtype of the weights; warns at the first step above it and at the end.

    Args:
        dtype: of the weights in training.
        corrected: True if the loss is weighed with the ratio of trainer and engine.
    """

    def __init__(self, dtype: torch.dtype, *, corrected: bool) -> None:
        self.bound = gap_bound(dtype)
        self._dtype, self._corrected = str(dtype).removeprefix("torch."), corrected
        self._steps = self._above = 0

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of metrics."""
        if row["logprob_gap_mean"] is None:
            return
        self._steps += 1
        if row["logprob_gap_mean"] <= self.bound:
            return
        self._above += 1
        if self._above == 1:
            remedy = "" if self._corrected else "; --engine-correction truncate bounds the harm"
            console.warn(
                f"step {row['step']}: the engine's log-probabilities are {row['logprob_gap_mean']:.2g} from the trainer's in the "
                f"mean ({row['logprob_gap_max']:.2g} at most), rounding in {self._dtype} stays below {self.bound:g}: does the "
                f"engine sample from other weights or at another temperature?{remedy}"
            )

    def summarize(self) -> None:
        """Print in how many steps the gap was above the bound, unless it never was."""
        if self._above:
            console.warn(
                f"the engine's log-probabilities were more than {self.bound:g} from the trainer's in {self._above} of "
                f"{self._steps} steps"
            )
