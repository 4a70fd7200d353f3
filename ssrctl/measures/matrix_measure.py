"""The common part of measures of single weight matrices: the tensors they take, their parts, and what they leave out."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ssrctl.checkpoints.pairs import Comparison, TensorPair
from ssrctl.configs import DiagnoseConfig
from ssrctl.io.console import note
from ssrctl.measures.base import Findings, PairMeasure
from ssrctl.measures.maths.grouping import Grouped, group_with_tensors
from ssrctl.measures.maths.matrices import skip_reason, updates
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix


class HasNumbers(Protocol):
    """A measure of one matrix as the json report holds it."""

    def numbers(self) -> dict[str, Any]:
        """Return the numbers by name."""


Value = TypeVar("Value", bound=HasNumbers)
Row = TypeVar("Row")

# One core's time for rank, spectrum and landing of a matrix, over the cube of its smaller side (eigenvectors) and over
# its size times that side (products); `benchmarks/diagnose_matrices.py`.
SECONDS_PER_CUBE, SECONDS_PER_PRODUCT = 4e-10, 2e-10
LONG_SECONDS = 900


@dataclass(frozen=True)
class OfMatrix(Generic[Value]):
    """A measure of one matrix.

    Attributes:
        value: the measure, or the reason why there is none.
    """

    shape: tuple[int, int]
    value: Value | Unmeasured


@dataclass(frozen=True, kw_only=True)
class MatrixResult(Generic[Row, Value]):
    """A measure of all matrices.

    Attributes:
        shapes: (m, n) of each matrix, by label.
        unmeasured: matrices without the measure, with the reason.
        skipped: tensors that are not matrices, with the reason.
    """

    name: str
    rows: Grouped[Row, Value]
    shapes: dict[str, tuple[int, int]]
    unmeasured: dict[str, str]
    skipped: dict[str, str]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report; without any matrix, what was skipped only."""
        if not self.shapes:
            return {"skipped": listed(self.skipped)}
        rows = self.rows.numbers(tensor=lambda name, one: {"shape": list(self.shapes[name])} | one.numbers())
        return {self.name: rows | {"unmeasured": listed(self.unmeasured)}, "skipped": listed(self.skipped)}


class MatrixMeasure(PairMeasure[dict[str, OfMatrix[Value]], MatrixResult[Row, Value]], Generic[Value, Row]):
    """A measure of the update of each weight matrix, and of some matrices of each stack of experts.

    Attributes:
        skipped: compared tensors that are not matrices, with the reason.
    """

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Find the tensors that are not matrices."""
        super().__init__(comparison, config, run)
        shapes, dtypes = comparison.base.shapes, comparison.base.dtypes
        reasons = {name: skip_reason(shapes[name], dtypes[name]) for name in comparison.names}
        self.skipped = {name: reason for name, reason in reasons.items() if reason is not None}

    def note_duration(self) -> None:
        """Say how long this measure and the others of matrices take together, where that is long."""
        shapes = [self.comparison.base.shapes[name] for name in self.comparison.names if name not in self.skipped]
        cubes = sum(math.prod(one[:-2]) * min(one[-2:]) ** 3 for one in shapes)
        products = sum(math.prod(one) * min(one[-2:]) for one in shapes)
        seconds = (SECONDS_PER_CUBE * cubes + SECONDS_PER_PRODUCT * products) / self.config.num_workers
        if seconds > LONG_SECONDS and self.config.device == "cpu":
            note(
                f"decomposing {len(shapes)} matrices takes about {seconds / 3600:.1f} hours; "
                "--layers 0,15,31 takes some of them, --measures sparsity,size none, --device cuda a GPU"
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
            for label, update in updates(pair, self.config.device).items()
        }

    @staticmethod
    @abc.abstractmethod
    def row(matrices: Sequence[tuple[str, Value]]) -> Row:
        """Return the row of several matrices, given with their labels."""

    @abc.abstractmethod
    def describe(self, result: MatrixResult[Row, Value]) -> Findings:
        """Return sentences, figures and tables of a result with matrices."""

    def combine(self, parts: Mapping[str, list[dict[str, OfMatrix[Value]]]]) -> MatrixResult[Row, Value]:
        """Return the measure by layer, kind and matrix."""
        found = {label: one for (of_tensor,) in parts.values() for label, one in of_tensor.items()}
        values = {label: one.value for label, one in found.items() if not isinstance(one.value, Unmeasured)}
        return MatrixResult(
            name=self.name,
            rows=group_with_tensors({label: (label, one) for label, one in values.items()}, self.row, values),
            shapes={label: one.shape for label, one in found.items()},
            unmeasured={label: one.value.reason for label, one in found.items() if isinstance(one.value, Unmeasured)},
            skipped=self.skipped,
        )

    def present(self, result: MatrixResult[Row, Value]) -> Findings:
        """Return the numbers; where there are matrices with sentences, figures and tables."""
        if not result.shapes:
            return Findings(numbers=result.numbers())
        found, lacking = self.describe(result), len(result.unmeasured)
        notes = [f"Matrices without a {self.name}, with the reason in a table: {lacking:,}."] if lacking else []
        return replace(found, numbers=result.numbers(), notes=[*found.notes, *notes])


def listed(reasons: Mapping[str, str]) -> list[dict[str, str]]:
    """Return names and reasons as the json report holds them."""
    return [{"name": name, "reason": reason} for name, reason in reasons.items()]
