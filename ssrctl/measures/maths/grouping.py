"""Tensors grouped by layer and by kind of matrix, for any measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ssrctl.checkpoints.names import KINDS, layer_index, matrix_kind

T = TypeVar("T")
Row = TypeVar("Row")
TensorRow = TypeVar("TensorRow")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Grouped(Generic[Row, TensorRow]):
    """A measure of all tensors together, and of each group of them.

    Attributes:
        layers: by layer in order; None holds the tensors outside of the layers and comes last.
        kinds: by kind of matrix, in the order of ``names.KINDS``.
        cells: by (layer, kind), in these orders.
        tensors: by tensor name, in the order given.
    """

    total: Row
    layers: dict[int | None, Row]
    kinds: dict[str, Row]
    cells: dict[tuple[int | None, str], Row]
    tensors: dict[str, TensorRow]

    def numbers(
        self,
        row: Callable[[Row], dict[str, Any]] = dataclasses.asdict,  # type: ignore[assignment]
        tensor: Callable[[str, TensorRow], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return the form of the json report: lists of rows that begin with their layer, kind or name.

        Args:
            row: numbers of a group's row.
            tensor: numbers of a tensor's row, from its name and the row; by default those of ``row``.
        """
        of_tensor = tensor or (lambda name, one: row(one))  # type: ignore[arg-type]
        return {
            "total": row(self.total),
            "layers": [{"layer": layer} | row(one) for layer, one in self.layers.items()],
            "kinds": [{"kind": kind} | row(one) for kind, one in self.kinds.items()],
            "cells": [{"layer": layer, "kind": kind} | row(one) for (layer, kind), one in self.cells.items()],
            "tensors": [
                {"name": name, "layer": layer_index(name), "kind": matrix_kind(name)} | of_tensor(name, one)
                for name, one in self.tensors.items()
            ],
        }

    @property
    def numbered_layers(self) -> dict[int, Row]:
        """The rows of the layers proper, without the tensors outside of them."""
        return {layer: row for layer, row in self.layers.items() if layer is not None}

    @property
    def labelled_layers(self) -> dict[str, Row]:
        """The rows of all layers, by the layer's name in figures and tables."""
        return {layer_label(layer): row for layer, row in self.layers.items()}


def group(found: Mapping[str, T], summary: Callable[[Sequence[T]], Row]) -> Grouped[Row, Row]:
    """Summarise the measures of single tensors by group; a tensor's own row is the summary of that tensor.

    Args:
        summary: the row of several tensors together; called with an empty list when there is no tensor.
    """
    return group_with_tensors(found, summary, {name: summary([one]) for name, one in found.items()})


def group_with_tensors(
    found: Mapping[str, T], summary: Callable[[Sequence[T]], Row], tensors: dict[str, TensorRow]
) -> Grouped[Row, TensorRow]:
    """Summarise as ``group`` does, with rows of another type for single tensors."""
    cells = _by_key(found, lambda name: (layer_index(name), matrix_kind(name)))
    order = sorted(cells, key=lambda cell: (cell[0] is None, cell[0] or 0, KINDS.index(cell[1])))
    return Grouped(
        total=summary(list(found.values())),
        layers={layer: summary(some) for layer, some in by_layer(found).items()},
        kinds={kind: summary(some) for kind, some in by_kind(found).items()},
        cells={cell: summary(cells[cell]) for cell in order},
        tensors=tensors,
    )


def by_layer(found: Mapping[str, T]) -> dict[int | None, list[T]]:
    """Return the measures of each layer's tensors, layers in order; None (outside of the layers) comes last."""
    layers = _by_key(found, layer_index)
    return {layer: layers[layer] for layer in sorted(layers, key=lambda layer: (layer is None, layer or 0))}


def by_kind(found: Mapping[str, T]) -> dict[str, list[T]]:
    """Return the measures of each kind of matrix, in the order of ``KINDS``."""
    kinds = _by_key(found, matrix_kind)
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}


def _by_key(found: Mapping[str, T], key: Callable[[str], Key]) -> dict[Key, list[T]]:
    """Return the measures of the tensors whose names have the same key."""
    names = by_key(found, key)
    return {each: [found[name] for name in names[each]] for each in names}


def by_key(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """Return the items by key, keys in the order of their first items."""
    groups: dict[Key, list[T]] = {}
    for one in items:
        groups.setdefault(key(one), []).append(one)
    return groups


def middle_layer(names: Iterable[str]) -> int | None:
    """Return the middle one of the layers that the tensors lie in; None without layers."""
    layers = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    return layers[len(layers) // 2] if layers else None


def layer_label(layer: int | None) -> str:
    """Return a layer number as figures show it."""
    return "outside" if layer is None else str(layer)
