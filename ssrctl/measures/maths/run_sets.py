"""The changed sets of several runs in one tensor, counted, and the same of independent sets.

``ssrctl.measures.overlap`` has the notation: A_i the set of weights that run i changed, p_i its density among N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.mask import TileSet
from ssrctl.core.popcount import popcount
from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.row_column_counts import Profile, agreement

# Tiles compared at once: 1 MiB for each run.
_TILES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class RunOverlap:
    """Counts of the changed sets of R runs in one tensor, and of their intersections.

    Attributes:
        numel: N.
        shared: ``[R][R]``, ``|A_i n A_j|``; the diagonal holds the sizes.
        depth: ``[R + 1]``, the number of weights that exactly r runs changed, r from 0.
        by_magnitude: for each power of two of the base's magnitudes, the weights and then ``|A_i|`` of each run there;
            empty when it was not counted.
        row_agreement, column_agreement: mean over pairs of runs of the rank correlation of their profiles
            (``row_column_counts.agreement``); None where there is none.
    """

    numel: int
    shared: tuple[tuple[int, ...], ...]
    depth: tuple[int, ...]
    by_magnitude: tuple[tuple[int, ...], ...] = ()
    row_agreement: float | None = None
    column_agreement: float | None = None

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.shared)

    @property
    def sizes(self) -> list[int]:
        """``|A_i|`` of each run."""
        return [self.shared[i][i] for i in range(self.num_runs)]

    @property
    def densities(self) -> list[float]:
        """``|A_i| / N`` of each run; 0 in an empty tensor."""
        return [size / self.numel if self.numel else 0.0 for size in self.sizes]


def run_overlap(
    sets: Sequence[TileSet], profiles: Sequence[Profile | None] = (), by_magnitude: Tensor | None = None
) -> RunOverlap:
    """Count the changed sets of one tensor and their intersections, without unpacking them.

    Args:
        sets: one for each run, at least one, over the same tensor.
        profiles: of the same sets, made before they were packed (``row_column_counts.profile``), to be compared as well.
        by_magnitude: ``magnitude.count_by_magnitude`` of the base with the same sets, for chance at equal magnitude.

    Raises:
        ValueError: no sets, or sets over different shapes.
    """
    if not sets or any(one.shape != sets[0].shape for one in sets):
        raise ValueError(f"one tensor's sets are needed, got shapes {[list(one.shape) for one in sets]}")
    num_runs = len(sets)
    shared = [[0] * num_runs for _ in sets]
    depth = torch.zeros(num_runs + 1, dtype=torch.int64)
    for words in _aligned_words(sets):
        for i in range(num_runs):
            for j in range(i, num_runs):
                shared[i][j] += int(popcount(words[i] & words[j]).sum())
        for runs, chosen in enumerate(_exactly(words)):
            depth[runs] += popcount(chosen).sum()
    # Coordinates that are in no tile at all were not counted as unchanged by every run, and a tile's padding was.
    depth[0] = sets[0].numel - int(depth[1:].sum())
    rows, columns = agreement([one for one in profiles if one is not None])
    return RunOverlap(
        numel=sets[0].numel,
        shared=tuple(tuple(shared[min(i, j)][max(i, j)] for j in range(num_runs)) for i in range(num_runs)),
        depth=tuple(depth.tolist()),
        by_magnitude=() if by_magnitude is None else tuple(map(tuple, by_magnitude.T.tolist())),
        row_agreement=rows,
        column_agreement=columns,
    )


def _aligned_words(sets: Sequence[TileSet]) -> Iterator[Tensor]:
    """Yield the same tiles of every run, int64 ``[runs, words]``, strip by strip; leave out tiles that no run has."""
    rows, columns = sets[0].grid
    for start in range(0, rows * columns, _TILES):
        edges = torch.tensor([start, start + _TILES])
        cuts = [torch.searchsorted(one.tile_ids, edges).tolist() for one in sets]
        ids = torch.cat([one.tile_ids[first:last] for one, (first, last) in zip(sets, cuts, strict=True)]).unique()
        if not ids.numel():
            continue
        strip = torch.zeros(len(sets), ids.numel(), sets[0].tiles.shape[1], dtype=torch.uint8)
        for run, (one, (first, last)) in enumerate(zip(sets, cuts, strict=True)):
            strip[run, torch.searchsorted(ids, one.tile_ids[first:last])] = one.tiles[first:last]
        yield strip.view(torch.int64).flatten(1)


def _exactly(words: Tensor) -> list[Tensor]:
    """Return for r = 0, 1, ... the bits that are set in exactly r rows of int64 ``[runs, words]``.

    Rows are taken in one after another: what was in exactly r of those before is in r + 1 or stays in r.
    """
    found = [torch.full_like(words[0], -1)]
    for row in words:
        taken = [one & row for one in found]
        found = [a & ~row for a in found] + [torch.zeros_like(row)]
        for runs, moved in enumerate(taken):
            found[runs + 1] |= moved
    return found


# --------------------------------------------------------------------------------------------------
# by chance


def expected_shared(tensors: Sequence[RunOverlap], i: int, j: int) -> float:
    """Return ``E|A_i n A_j|`` of independent sets of the same sizes in each tensor: the sum of ``N p_i p_j``, i != j."""
    return math.fsum(one.sizes[i] * one.sizes[j] / one.numel for one in tensors if one.numel)


def expected_shared_same_size(tensors: Sequence[RunOverlap], i: int, j: int) -> float | None:
    """Return the same of sets with as many weights of each magnitude as A_i and A_j; None where that was not counted.

    Runs that move small weights because those have small steps have this overlap without any other agreement.
    """
    if any(one.numel and not one.by_magnitude for one in tensors):
        return None
    return math.fsum(part[1 + i] * part[1 + j] / part[0] for one in tensors for part in one.by_magnitude)


def bernoulli_jaccard(p: float, q: float) -> float | None:
    """Return the Jaccard index of independent sets of densities p and q, ``p q / (p + q - p q)`` (Zhu et al., sec. 2.2).

    A ratio of expectations. None when both are 0.
    """
    return ratio(p * q, p + q - p * q)


def at_least(densities: Sequence[float]) -> list[float]:
    """Return for r = 0 ... R the chance that at least r of R independent events happen (Poisson-binomial)."""
    exactly = [1.0]
    for p in densities:
        exactly = [a * (1 - p) + b * p for a, b in zip([*exactly, 0.0], [0.0, *exactly], strict=True)]
    return [math.fsum(exactly[runs:]) for runs in range(len(exactly))]
