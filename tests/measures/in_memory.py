"""Checkpoints in memory, measured as ``ssrctl diagnose`` measures those in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ssrctl.checkpoints.pairs import Checkpoint, Comparison
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.base import Measure, Mode, Taken, take

Weights = Mapping[str, torch.Tensor]


class MemoryReader:
    """The part of a ``TensorReader`` that measures of whole tensors use."""

    def __init__(self, tensors: Weights) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def same_bytes(self, name: str, other: MemoryReader) -> bool:
        return False


def opened(base: Weights, *tuned: Weights) -> Comparison:
    """Return a comparison of checkpoints called 1, 2, ..."""
    readers = [cast(TensorReader, MemoryReader(tensors)) for tensors in (base, *tuned)]
    checkpoints = [Checkpoint(str(place), reader, False) for place, reader in enumerate(readers[1:], 1)]
    return Comparison(readers[0], checkpoints, list(base), [])


def taken(
    measures: Sequence[type[Measure[Any, Any]]], base: Weights, *tuned: Weights, mode: Mode = "pair", **settings: Any
) -> list[Taken[Any]]:
    """Take measures with the given settings of ``DiagnoseConfig``."""
    return taken_of(measures, opened(base, *tuned), mode, **settings)


def taken_of(
    measures: Sequence[type[Measure[Any, Any]]], comparison: Comparison, mode: Mode, **settings: Any
) -> list[Taken[Any]]:
    """Take measures of an open comparison."""
    config = DiagnoseConfig(paths=[Path("base"), *(Path(one.label) for one in comparison.tuned)], **settings)
    return take(comparison, [measure(comparison, config) for measure in measures], mode, config.num_workers)
