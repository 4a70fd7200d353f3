"""Masks made from weights or at random, one tensor at a time; they do not change during training.

Every function returns a bool tensor of the weights' shape (True = selected) with an exact number of selected
coordinates, and needs a few bytes of scratch for each weight. Shares are rounded to the nearest count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssrctl.core.counting import HIGH_BINS, INFINITY, LOW_BINS, PATTERN_DTYPES, keys_of, threshold_bin

LowRank = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
Keys = Callable[[Tensor], Tensor]  # flat scores -> int32 keys, at least 0, see ``counting``

_PART = 1 << 20  # elements that are worked on at once, so that their keys stay in a core's cache
# This many draws take 8 MB, and sorting them three times that.
_DRAWS = 1 << 20
# From this share on, a number for each coordinate costs less than drawing the selected ones one by one.
_DENSE_SHARE = 1 / 64


class NonFiniteWeights(ValueError):
    """Weights that are NaN or infinite have no place in an order of magnitudes.

    Attributes:
        count: number of coordinates.
        numel: of how many.
    """

    def __init__(self, count: int, numel: int) -> None:
        super().__init__(f"{count:,} of {numel:,} weights are NaN or infinite")
        self.count, self.numel = count, numel


def count_of(density: float, numel: int) -> int:
    """Return ``density * numel`` rounded to the nearest number of coordinates, halves to even."""
    return round(density * numel)


# --------------------------------------------------------------------------------------------------
# by chance


def random_mask(shape: Sequence[int], density: float, seed: int) -> Tensor:
    """Return a share of a tensor, drawn uniformly without replacement (Adewuyi et al. 2026, section 2.2).

    Each set of ``count_of(density, numel)`` coordinates is equally likely: nothing in the draw but the numbers drawn
    tells one coordinate from another. It takes at most about 2 bytes for each coordinate.

    Args:
        shape: of the tensor.
        density: share to select, in [0, 1].
        seed: of the draw; give each tensor its own (``core.seeds``), or equal shapes get equal masks. Equal arguments
            give equal masks on every machine.

    Returns:
        bool tensor of ``shape``.
    """
    numel = math.prod(shape)
    count = count_of(density, numel)
    # The smaller side is drawn: then at least every second number hits a coordinate that is still free.
    wanted = min(count, numel - count)
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = _coin_flips(numel, wanted, generator)
        missing = wanted - int(drawn.count_nonzero())  # a sum of flags would first copy them as int64
        if missing >= 0:
            break  # or else too many came up, which is rare: flip all coins again
    while missing:
        missing -= _draw_more(drawn, missing, generator)
    return (drawn if wanted == count else ~drawn).view(tuple(shape))


def _coin_flips(numel: int, wanted: int, generator: torch.Generator) -> Tensor:
    """bool ``[numel]``: each selected on its own, so rarely that ``wanted`` is hardly ever exceeded."""
    flips = torch.zeros(numel, dtype=torch.bool)
    if wanted <= numel * _DENSE_SHARE:
        return flips
    share = max(0.0, wanted - 6 * math.sqrt(wanted)) / numel
    below = math.floor(share * 2**16) - 2**15
    for part in flips.split(4 * _DRAWS):
        words = torch.empty(-(-part.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        torch.lt(words.view(torch.int16)[: part.numel()], below, out=part)  # four numbers from each word
    return flips


def _draw_more(drawn: Tensor, missing: int, generator: torch.Generator) -> int:
    """Select up to ``missing`` more coordinates, those that come first in a sequence of draws; returns how many."""
    size = min(2 * missing + 16, _DRAWS)
    # 63 bits, as the remainder of a 32-bit number would favour low coordinates of large tensors
    places = torch.empty(size, dtype=torch.int64).random_(generator=generator) % drawn.numel()
    ordered, turn = places.sort(stable=True)
    fresh = ~drawn[ordered]
    fresh[1:] &= ordered[1:] != ordered[:-1]
    first = turn[fresh].sort().values[:missing]
    drawn[places[first]] = True
    return first.numel()


# --------------------------------------------------------------------------------------------------
# by magnitude


def largest_mask(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` coordinates with the largest ``|score|``, of equal ones those of lowest index.

    Args:
        scores: float32, bfloat16 or float16, any shape.
        count: in [0, numel].

    Returns:
        bool tensor of the scores' shape.

    Raises:
        ValueError: another dtype.
        NonFiniteWeights: NaN or infinity among the scores.
    """
    return _largest_keys(*_checked(scores), count).view(scores.shape)


def smallest_mask(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` coordinates with the smallest ``|score|``, of equal ones those of lowest index; as above."""
    parts, keys = _checked(scores)
    # finite keys lie below INFINITY, so that these are at least 0
    return _largest_keys(parts, lambda part: INFINITY - 1 - keys(part), count).view(scores.shape)


def _checked(scores: Tensor) -> tuple[Sequence[Tensor], Keys]:
    """Return the scores, all finite, in flat parts, and a function for the keys of |score| of a part."""
    if scores.dtype not in PATTERN_DTYPES:
        raise ValueError(f"expected float32, bfloat16 or float16, got {str(scores.dtype).removeprefix('torch.')}")

    def keys(part: Tensor) -> Tensor:
        return keys_of(part.abs().view(PATTERN_DTYPES[scores.dtype]), scores.dtype)

    parts = scores.detach().reshape(-1).split(_PART)
    if broken := sum(int((keys(part) >= INFINITY).count_nonzero()) for part in parts):
        raise NonFiniteWeights(broken, scores.numel())
    return parts, keys


def _largest_keys(parts: Sequence[Tensor], keys: Keys, count: int) -> Tensor:
    """bool ``[n]``: the ``count`` largest of the parts' keys together, of equal ones the first.

    As ``counting.choose``, but the keys are computed again in each of three passes rather than held;
    ``topk.select_topk`` would hold 12 bytes for each candidate, and there are many when half of a tensor is selected.
    """
    selected = torch.zeros(sum(part.numel() for part in parts), dtype=torch.bool)
    if not 0 <= count <= selected.numel():
        raise ValueError(f"cannot select {count} of {selected.numel()} coordinates")
    if count == 0:
        return selected
    high = torch.zeros(HIGH_BINS, dtype=torch.int64)
    for part in parts:
        high += torch.bincount(keys(part) >> 16, minlength=HIGH_BINS)
    high_bin, above = threshold_bin(high, count)
    low = torch.zeros(LOW_BINS, dtype=torch.int64)
    for part in parts:
        found = keys(part)
        low += torch.bincount(found[found >> 16 == high_bin] & (LOW_BINS - 1), minlength=LOW_BINS)
    low_bin, above_inside = threshold_bin(low, count - above)
    num_ties = count - above - above_inside
    for part, flags in zip(parts, selected.split(_PART), strict=True):
        found = keys(part)
        torch.gt(found, high_bin << 16 | low_bin, out=flags)
        ties = (found == (high_bin << 16 | low_bin)).nonzero().flatten()[:num_ties]
        flags[ties] = True
        num_ties -= ties.numel()
    return selected


def low_magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """Return the smallest weights by magnitude (Zhu et al. 2025, section 4.2: ``M_low = Bottom_alpha(|W|)``).

    Args:
        weight: float32, bfloat16 or float16, any shape.
        density: share of the tensor, alpha, in [0, 1].

    Returns:
        bool tensor of the weight's shape; of equal magnitudes those of lowest index are selected.

    Raises:
        ValueError: another dtype.
        NonFiniteWeights: NaN or infinity among the weights.
    """
    return smallest_mask(weight, count_of(density, weight.numel()))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a full SVD: (U ``[m, rank]``, S ``[rank]``, V ``[n, rank]``), float64."""
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


def principal_mask(weight: Tensor, rank: int, density: float, low_rank: LowRank = truncated_svd) -> Tensor:
    """Return the largest entries of a matrix's low-rank reconstruction (Zhu et al. 2025, section 4.2).

    ``M_princ = Top_alpha(|U_k S_k V_k^T|)``: the weights that the leading singular directions rest on.

    Args:
        weight: ``[m, n]``, any floating dtype.
        rank: k, in [1, min(m, n)].
        density: share of the matrix, alpha, in [0, 1].
        low_rank: a function that returns (U ``[m, k]``, S ``[k]``, V ``[n, k]``); the default
            is slow beyond a few thousand rows.

    Returns:
        bool ``[m, n]``; entries are compared in float32, of equal magnitudes those of lowest index are selected.

    Raises:
        ValueError: no matrix, or a rank that it does not have.
        NonFiniteWeights: NaN or infinity among the weights.
    """
    if weight.dim() != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"a tensor of shape {list(weight.shape)} has no reconstruction of rank {rank}")
    broken: int = sum(int((~part.isfinite()).count_nonzero()) for part in weight.split(_rows(weight)))
    if broken:
        raise NonFiniteWeights(broken, weight.numel())
    u, s, v = low_rank(weight, rank)
    scores = torch.empty(weight.shape, dtype=torch.float32)
    for part, left in zip(scores.split(_rows(weight)), u.split(_rows(weight)), strict=True):
        part.copy_((left * s) @ v.mT)
    return largest_mask(scores, count_of(density, weight.numel()))


def _rows(matrix: Tensor) -> int:
    """So many rows are worked on at once."""
    return max(1, _PART // matrix.shape[1])


def rank_of(share: float, shape: Sequence[int]) -> int:
    """Return a share in (0, 1] of a matrix's smaller side as a rank, rounded up."""
    return math.ceil(round(share * min(shape), 6))  # 0.07 * 100 is a little more than 7
