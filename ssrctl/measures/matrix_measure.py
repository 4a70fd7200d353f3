"""The common part of measures of single weight matrices: the tensors they take, their parts, and what they leave out."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from ssrctl.io.console import note
from ssrctl.measures.base import PairMeasure
from ssrctl.measures.maths.matrices import skip_reason, updates
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix

if TYPE_CHECKING:
    from ssrctl.checkpoints.pairs import Comparison, TensorPair
    from ssrctl.configs import DiagnoseConfig

Value = TypeVar("Value")
Result = TypeVar("Result")

# One core's time for rank, spectrum and landing of a matrix, over its size times its smaller side.
SECONDS_PER_UNIT = 1e-9
LONG_SECONDS = 900


@dataclass(frozen=True)
class OfMatrix(Generic[Value]):
    """A measure of one matrix.

    Attributes:
        shape: (m, n).
        value: the measure, or the reason why there is none.
    """

    shape: tuple[int, int]
    value: Value | Unmeasured


class MatrixMeasure(PairMeasure[dict[str, OfMatrix[Value]], Result]):
    """A measure of the update of each weight matrix, and of some matrices of each stack of experts.

    Attributes:
        skipped: compared tensors that are not matrices, with the reason.
    """

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Find the tensors that are not matrices, and say how long decomposing the others takes where that is long."""
        super().__init__(comparison, config, run)
        shapes, dtypes = comparison.base.shapes, comparison.base.dtypes
        reasons = {name: skip_reason(shapes[name], dtypes[name]) for name in comparison.names}
        self.skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        measured = [shapes[name] for name, reason in reasons.items() if reason is None]
        seconds = SECONDS_PER_UNIT * sum(math.prod(one) * min(one[-2:]) for one in measured) / config.num_workers
        if seconds > LONG_SECONDS:
            note(
                f"{self.name}: decomposing {len(measured)} matrices takes about {seconds / 3600:.1f} hours; "
                "--layers 0,15,31 takes some of them, --measures sparsity,size none"
            )

    @abc.abstractmethod
    def matrix(self, pair: TensorPair, label: str, update: UpdateMatrix) -> Value | Unmeasured:
        """Return the measure of one matrix; ``label`` is the tensor's name, of an expert with its number."""

    def tensor(self, pair: TensorPair) -> dict[str, OfMatrix[Value]] | None:
        """Return the measure of each matrix of a tensor, by label; None for a tensor that is not a matrix."""
        if pair.name in self.skipped:
            return None
        shape = (pair.shape[-2], pair.shape[-1])
        return {
            label: OfMatrix(shape, update if isinstance(update, Unmeasured) else self.matrix(pair, label, update))
            for label, update in updates(pair).items()
        }

    @staticmethod
    def sorted_out(
        parts: Mapping[str, list[dict[str, OfMatrix[Value]]]],
    ) -> tuple[dict[str, Value], dict[str, tuple[int, int]], dict[str, str]]:
        """Return (measures, shapes of all matrices, reasons of those without a measure), each by label."""
        found = {label: one for (of_tensor,) in parts.values() for label, one in of_tensor.items()}
        values = {label: one.value for label, one in found.items() if not isinstance(one.value, Unmeasured)}
        reasons = {label: one.value.reason for label, one in found.items() if isinstance(one.value, Unmeasured)}
        return values, {label: one.shape for label, one in found.items()}, reasons


def listed(reasons: Mapping[str, str]) -> list[dict[str, str]]:
    """Return names and reasons as report.json holds them."""
    return [{"name": name, "reason": reason} for name, reason in reasons.items()]


def unmeasured_notes(what: str, reasons: Mapping[str, str]) -> list[str]:
    """Return a note on the matrices that lack a measure; none when there are none."""
    return [f"Matrices without a {what}, with the reason in a table: {len(reasons):,}."] if reasons else []
