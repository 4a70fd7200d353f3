"""Candidate sets from several gradients, and their unions cut to one size (SSR section 2.2)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import select_topk

Indices = dict[str, Tensor]

ALL_COMBINATIONS_UP_TO = 4
SIZES = (0.04, 0.03, 0.02, 0.015, 0.01, 0.0075, 0.005, 0.0025, 0.001)


@dataclass(frozen=True)
class Candidates:
    """The largest coordinates of one gradient.

    Attributes:
        members: all of them, those with a gradient of 0 left out.
        indices: flat indices of the ``keep`` largest, int64 ``[k_t]`` per tensor, ascending.
        scores: float32 ``[k_t]`` per tensor: |g| over the smallest |g| among ``members``, so at least 1.
    """

    members: BlockMask
    indices: Indices
    scores: dict[str, Tensor]


def find_candidates(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], num_members: int, keep: int
) -> Candidates:
    """Return the ``num_members`` largest |g|, and scores for the ``keep`` largest of them.

    Args:
        gradients: tensors of one dtype; a name of ``shapes`` may be absent (it has no gradient).
        shapes: of all tensors.
        num_members: candidates to take; fewer when fewer gradients differ from 0.
        keep: number of members with a score, at most ``num_members``; a cut to this size needs no more (see ``unite``).

    Raises:
        ValueError: ``keep`` above ``num_members``.
        NonFiniteGradient: NaN or infinity in a gradient.
    """
    if keep > num_members:
        raise ValueError(f"keep={keep} exceeds num_members={num_members}")
    flat = {name: gradient.reshape(-1) for name, gradient in gradients.items()}
    members = {}
    smallest = float("inf")
    for name, indices in select_topk(gradients, num_members).items():
        magnitudes = flat[name][indices].abs()
        members[name] = indices[magnitudes > 0]
        if members[name].numel():
            smallest = min(smallest, float(magnitudes[magnitudes > 0].min()))
    kept, scores = {}, {}
    for name, indices in select_topk(gradients, keep).items():
        magnitudes = flat[name][indices].abs().float()
        kept[name] = indices[magnitudes > 0].cpu()
        scores[name] = (magnitudes[magnitudes > 0] / smallest).cpu()
    on_cpu = {name: indices.cpu() for name, indices in members.items()}
    return Candidates(BlockMask.from_indices(shapes, on_cpu), kept, scores)


def combinations(num_subsets: int) -> list[tuple[int, ...]]:
    """Return the subsets to unite: every non-empty combination of up to 4, else singles, pairs and all of them."""
    sizes = range(1, num_subsets + 1) if num_subsets <= ALL_COMBINATIONS_UP_TO else (1, 2, num_subsets)
    return [chosen for size in sizes for chosen in itertools.combinations(range(num_subsets), size)]


def unite(candidates: Sequence[Candidates], size: int) -> Indices:
    """Return the union of candidate sets, cut to its ``size`` best members.

    A member's rank is its largest score over the sets, a score being the gradient in units of that set's
    own entry threshold, so that a subset of prompts with larger gradients has no advantage. Where a coordinate
    is not a candidate its score would be below 1, where it is one it is at least 1; so the largest is always that
    of a set it belongs to. And whatever is among the best ``size`` of the union is among the best ``size`` of
    the set that ranks it highest, so the scores that ``find_candidates`` keeps are enough for an exact cut.

    Args:
        candidates: one or more, over the same tensors, each with at least ``size`` scores where it has as
            many members.
        size: members to keep; all are kept when there are fewer.

    Returns:
        Ascending flat indices, int64 ``[k_t]`` per tensor. Equal scores go to the lowest (tensor, index).
    """
    names = list(dict.fromkeys(name for one in candidates for name in one.indices))
    members: Indices = {}
    scores: dict[str, Tensor] = {}
    for name in names:
        having = [one for one in candidates if name in one.indices]
        indices = torch.cat([one.indices[name] for one in having])
        members[name], place = torch.unique(indices, sorted=True, return_inverse=True)
        best = torch.zeros(members[name].numel(), dtype=torch.float32)
        scores[name] = best.scatter_reduce_(0, place, torch.cat([one.scores[name] for one in having]), "amax")
    return {name: members[name][best] for name, best in select_topk(scores, size).items()}


def random_coordinates(shapes: Mapping[str, Sequence[int]], size: int, seed: int) -> Indices:
    """``size`` distinct coordinates, uniformly over all tensors together.

    Args:
        shapes: of all tensors.
        size: number of members.
        seed: of the draw; equal arguments give equal sets.

    Returns:
        Ascending flat indices, int64 ``[k_t]`` per tensor.

    Raises:
        ValueError: more than there are.
    """
    numels = torch.tensor([torch.Size(shape).numel() for shape in shapes.values()])
    total = int(numels.sum())
    if not 0 <= size <= total:
        raise ValueError(f"cannot draw {size} of {total} coordinates")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(0, dtype=torch.int64)
    # Collisions are thrown away and drawn again; beyond half of everything, what to leave out is drawn.
    wanted = min(size, total - size)
    while drawn.numel() < wanted:
        more = torch.randint(total, (wanted + wanted // 8 + 16,), generator=generator)
        drawn = torch.unique(torch.cat([drawn, more]))
        drawn = drawn[torch.randperm(drawn.numel(), generator=generator)][:wanted]
    if wanted < size:
        left = torch.ones(total, dtype=torch.bool)
        left[drawn] = False
        drawn = left.nonzero().flatten()
    drawn = drawn.sort().values
    ends = numels.cumsum(0)
    cuts = torch.searchsorted(drawn, ends).tolist()
    starts = (ends - numels).tolist()
    return {
        name: drawn[low:high] - start
        for name, low, high, start in zip(shapes, [0, *cuts[:-1]], cuts, starts, strict=True)
    }


def sizes_below(fraction: float, num_coordinates: int) -> list[float]:
    """Return the sizes to try for a minimal set, from ``fraction`` down to a single coordinate.

    They are those of 4, 3, 2, 1.5, 1, 0.75, 0.5, 0.25, 0.1%, then 0.05, 0.025, 0.01% and so on.
    """
    ladder = list(SIZES)
    while ladder[-1] * num_coordinates >= 1:
        decade = ladder[-1]
        ladder += [decade / 2, decade / 4, decade / 10]
    return [size for size in ladder if size <= fraction and size * num_coordinates >= 1]
