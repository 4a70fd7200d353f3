"""Masks that are made from a checkpoint's weights, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssrctl.checkpoints.names import layer_index, matching
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.report.formats import times

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask, TileSet
    from ssrctl.models.stored_parameters import StoredParameters

Shape = tuple[int, ...]
Names = Callable[[Sequence[str]], Iterable[str]]  # gives the same names, one by one


@dataclass(frozen=True)
class Recipe:
    """One way to make a mask.

    Attributes:
        kind: of the mask.
        count: number of a tensor's coordinates to select, by its name and shape.
        select: selects them, of a parameter with a count above 0.
        remarks: notes on the finished mask, given the shapes of the tensors that have a count of 0.
    """

    kind: str
    count: Callable[[str, Shape], int]
    select: Callable[[str, StoredParameters], TileSet]
    remarks: Callable[[Mapping[str, Shape]], list[str]]


def random_recipe(density: float, seed: int) -> Recipe:
    """Select a share of each tensor, drawn for each from the seed and its name."""
    return Recipe("random", _share_of(density), _draw(lambda name, numel: density, seed), _too_small)


def like_recipe(counts: Mapping[str, int], seed: int) -> Recipe:
    """Select as many weights of each tensor as ``counts`` says, by name, drawn as ``random_recipe`` draws them."""
    draw = _draw(lambda name, numel: counts[name] / numel, seed)
    return Recipe("random", lambda name, shape: counts[name], draw, lambda nothing: [])


def _draw(density_of: Callable[[str, int], float], seed: int) -> Callable[[str, StoredParameters], TileSet]:
    """Return the selection of random coordinates, whose share of a tensor follows from its name and size."""
    from ssrctl.core.mask import TileSet
    from ssrctl.core.static_masks import random_mask

    def select(name: str, stored: StoredParameters) -> TileSet:
        shape = stored.shapes[name]
        density = density_of(name, math.prod(shape))
        return TileSet.from_dense(random_mask(shape, density, derive_seed(seed, "random mask", name)))

    return select


def low_magnitude_recipe(density: float) -> Recipe:
    """Select the smallest weights of each tensor."""
    from ssrctl.core.static_masks import low_magnitude_mask

    def select(name: str, stored: StoredParameters) -> TileSet:
        return _selected(name, stored, lambda weight: low_magnitude_mask(weight, density))

    return Recipe("low-magnitude", _share_of(density), select, _too_small)


def principal_recipe(density: float, rank: float) -> Recipe:
    """Select the largest weights of each matrix's reconstruction from its leading singular directions.

    Args:
        density: share of each matrix.
        rank: of the reconstruction, as a share of the smaller side.
    """
    from ssrctl.core.static_masks import principal_mask, rank_of

    share = _share_of(density)

    def count(name: str, shape: Shape) -> int:
        return share(name, shape) if len(shape) == 2 else 0

    def select(name: str, stored: StoredParameters) -> TileSet:
        k = rank_of(rank, stored.shapes[name])
        return _selected(name, stored, lambda weight: principal_mask(weight, k, density, _leading_triplets))

    def remarks(nothing: Mapping[str, Shape]) -> list[str]:
        odd = [name for name, shape in nothing.items() if len(shape) != 2]
        notes = [f"{times(len(odd), 'tensor')} that are not matrices left out, first {min(odd)}."] if odd else []
        return notes + _too_small({name: shape for name, shape in nothing.items() if name not in odd})

    return Recipe("principal", count, select, remarks)


def layers_recipe(layers: Sequence[range] | None) -> Recipe:
    """Select all weights of the tensors in some layers; None: of all tensors, inside and outside of layers."""
    from ssrctl.core.mask import TileSet

    def count(name: str, shape: Shape) -> int:
        layer = layer_index(name)
        inside = layers is None or (layer is not None and any(layer in one for one in layers))
        return math.prod(shape) if inside else 0

    def select(name: str, stored: StoredParameters) -> TileSet:
        return TileSet.empty(stored.shapes[name]).complement()

    return Recipe("layers", count, select, lambda nothing: [])


def planned_counts(
    stored: StoredParameters, recipe: Recipe, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, int]:
    """Return the number of coordinates that a recipe selects, of each parameter that the patterns keep.

    Args:
        stored: the parameters.
        recipe: how the mask is made.
        include: glob patterns; without any, all parameters are taken.
        exclude: glob patterns of parameters to leave out.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    owner = stored.reader.label
    taken = matching(stored.names, "--include", include, owner) if include else set(stored.names)
    taken -= matching(stored.names, "--exclude", exclude, owner)
    return {name: recipe.count(name, shape) for name, shape in stored.shapes.items() if name in taken}


def make_mask(
    stored: StoredParameters, recipe: Recipe, counts: Mapping[str, int], one_by_one: Names
) -> tuple[BlockMask, str]:
    """Return (mask, fingerprint of the weights, which are read on the way).

    Args:
        stored: the parameters.
        recipe: how the mask is made.
        counts: of ``planned_counts``.
        one_by_one: follows the progress.

    Raises:
        UserError: weights that the recipe cannot order.
    """
    from ssrctl.checkpoints.fingerprint import RunningFingerprint
    from ssrctl.core.mask import BlockMask, TileSet

    fingerprint = RunningFingerprint()
    tensors = {}
    for name in one_by_one(stored.reader.in_file_order(stored.names)):
        fingerprint.begin(name, stored.dtype_of(name), stored.shapes[name])
        for piece in stored.pieces(name):
            fingerprint.update(piece)
        wanted = counts.get(name, 0)
        tensors[name] = recipe.select(name, stored) if wanted else TileSet.empty(stored.shapes[name])
        assert tensors[name].count() == wanted, name
    return BlockMask({name: tensors[name] for name in stored.names}), fingerprint.digest()


def _share_of(density: float) -> Callable[[str, Shape], int]:
    from ssrctl.core.static_masks import count_of

    return lambda name, shape: count_of(density, math.prod(shape))


def _selected(name: str, stored: StoredParameters, choose: Callable[[Tensor], Tensor]) -> TileSet:
    """Return the coordinates of a parameter that ``choose`` selects; weights without an order are a UserError."""
    from ssrctl.core.mask import TileSet

    try:
        return TileSet.from_dense(choose(stored.tensor(name)))
    except ValueError as error:
        raise UserError(
            f"{stored.reader.label}: {name}: {error}", f"fix the weights, or leave it out with --exclude '{name}'"
        ) from error


def _leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, S, V)."""
    from ssrctl.measures.maths.low_rank import rank_k_svd

    found = rank_k_svd(weight, rank)
    return found.U, found.S, found.V


def _too_small(nothing: Mapping[str, Shape]) -> list[str]:
    if not nothing:
        return []
    return [f"{times(len(nothing), 'tensor')} too small for one weight at this density, first {min(nothing)}."]
