"""Keys of magnitudes, and thresholds from counts of keys: what exact selection is made of.

The bit pattern of |x| orders like |x| itself for every IEEE float, and a bfloat16 or float16 has the same value
as a float32. So the float32 pattern of |g| is the *key* of a coordinate: an int32 that compares across dtypes.
The upper 16 bits of keys are counted in 32,768 bins (for bfloat16 they are the whole magnitude); the bin in which
the k-th largest falls follows from the cumulative counts, and the lower 16 bits are counted once more inside it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HIGH_BINS = 1 << 15
LOW_BINS = 1 << 16
INFINITY = 0x7F800000  # the key of infinity; those of NaN are larger
FEW = 1 << 20  # candidates of which one core finds the k-th largest sooner than it counts in bins
LARGEST_KEY = 0x7FFFFFFF
PATTERN_DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def keys_of(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 keys of the integer patterns of magnitudes in ``dtype``; negative patterns give negative keys."""
    if dtype == torch.bfloat16:
        return pattern.to(torch.int32) << 16
    if dtype == torch.float32:
        return pattern
    # a negative pattern may be a NaN, whose sign CUDA's conversion drops
    return pattern.view(torch.float16).float().view(torch.int32) | (pattern.to(torch.int32) & -(1 << 31))


def pattern_bound(bound: int, dtype: torch.dtype) -> int:
    """Return the smallest pattern of ``dtype`` whose key is at least ``bound``, or else the largest pattern."""
    if dtype == torch.float32:
        return bound
    if dtype == torch.bfloat16:
        return min((bound + 0xFFFF) >> 16, 0x7FFF)
    return int(torch.searchsorted(_half_keys(), bound))


@cache
def _half_keys() -> Tensor:
    """int32 ``[0x7C01]``: the keys of the float16 patterns from zero to infinity, ascending."""
    return keys_of(torch.arange(0x7C01, dtype=torch.int16), torch.float16)


class Group:
    """Sums of counts over the processes that hold the shards; one process when there is no process group."""

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self.group = process_group

    def total(self, counts: Tensor) -> Tensor:
        """Return the tensor (int64 or float64, on the CPU) summed over all processes, the same bits in each."""
        if self.group is None:
            return counts
        import torch.distributed as dist

        device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend(self.group) == "nccl" else "cpu"
        summed = counts.to(device, copy=True)
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()

    def joined(self, tensor: Tensor) -> Tensor:
        """Return the tensors ``[n]`` of all processes, whose lengths may differ, one after another by rank."""
        if self.group is None:
            return tensor
        import torch.distributed as dist

        counts = torch.zeros(self.group.size(), dtype=torch.int64)
        counts[self.group.rank()] = tensor.numel()
        counts = self.total(counts)
        padded = tensor.new_zeros(int(counts.max()))
        padded[: tensor.numel()] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def share(self, counts: Tensor, wanted: int) -> int:
        """Divide the first ``wanted`` of some things among the processes, in the order of their tensors.

        Args:
            counts: int64 ``[T]``, by tensor how many this process has; every process has its part of the same T tensors.
            wanted: number to take of all, those of the first tensor first, and within a tensor those of the lowest rank.

        Returns:
            The number that this process takes, from its first ones on.
        """
        if self.group is None:
            return min(wanted, int(counts.sum()))
        everyone = torch.zeros(counts.numel(), self.group.size(), dtype=torch.int64)
        everyone[:, self.group.rank()] = counts
        everyone = self.total(everyone)
        before = everyone.flatten().cumsum(0).view_as(everyone) - everyone
        return int((wanted - before).clamp(min=0).minimum(everyone)[:, self.group.rank()].sum())

    def first(self, found: tuple[str, int] | None) -> tuple[str, int] | None:
        """Return the result of the lowest-ranked process that found one; None if none did."""
        if self.group is None or not int(self.total(torch.tensor(int(found is not None)))):
            return found
        import torch.distributed as dist

        everyone: list[tuple[str, int] | None] = [None] * self.group.size()
        dist.all_gather_object(everyone, found, group=self.group)
        return next(one for one in everyone if one is not None)


ALONE = Group()


def choose(keys: Tensor, k: int, group: Group = ALONE, edges: Tensor | None = None) -> tuple[Tensor, int]:
    """Return the candidates that are among the ``k`` largest of all processes, ties to the first ones.

    Args:
        keys: int32 ``[m]``, at least 0, in the order in which ties are decided.
        k: at least 1.
        group: ties go to the lowest (tensor, rank, place).
        edges: int64 ``[T + 1]``, ascending: the candidates ``edges[t]:edges[t + 1]`` are of tensor t. None: of one.

    Returns:
        bool ``[m]``, True = chosen, and the k-th largest key; -1 when all processes together have at most k
        candidates, which are all chosen.
    """
    if group.group is None and keys.numel() <= FEW and not keys.is_cuda:
        if keys.numel() <= k:
            return torch.ones_like(keys, dtype=torch.bool), -1
        threshold = int(keys.kthvalue(keys.numel() - k + 1).values)
        chosen = keys > threshold
        ties = (keys == threshold).nonzero().flatten()
        chosen.index_fill_(0, ties[: k - int(chosen.sum())], True)
        return chosen, threshold
    high = group.total(torch.bincount(keys >> 16, minlength=HIGH_BINS).cpu())
    if number_of(high) <= k:
        return torch.ones_like(keys, dtype=torch.bool), -1
    high_bin, above = threshold_bin(high, k)
    inside = keys[keys >> 16 == high_bin] & (LOW_BINS - 1)
    low = group.total(torch.bincount(inside, minlength=LOW_BINS).cpu())
    low_bin, above_inside = threshold_bin(low, k - above)
    threshold = high_bin << 16 | low_bin
    chosen = keys > threshold
    ties = (keys == threshold).nonzero().flatten()
    edges = torch.tensor([0, keys.numel()]) if edges is None else edges
    counts = torch.searchsorted(ties, edges.to(ties.device)).diff().cpu()
    chosen.index_fill_(0, ties[: group.share(counts, k - above - above_inside)], True)
    return chosen, threshold


def threshold_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest, and how many lie in higher bins (fewer than k).

    Args:
        counts: int64 ``[bins]`` (CPU), which sum to at least ``k``; the number of bins is a multiple of 256.
    """
    blocks = counts.view(-1, 256).numpy()  # torch would share these few numbers out among all cores
    block, above = _last_from_top(blocks.sum(1), k)
    place, above_inside = _last_from_top(blocks[block], k - above)
    return block * 256 + place, above + above_inside


def number_of(counts: Tensor) -> int:
    """Return the sum of counts, int64 on the CPU."""
    return int(counts.numpy().sum())


def _last_from_top(counts: Any, k: int) -> tuple[int, int]:
    """``threshold_bin`` for few bins, an array of numpy: one cumulative sum over all."""
    from_top = counts[::-1].cumsum()
    place = int(from_top.searchsorted(k))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above


class Candidates:
    """Candidates that a pass over the gradients has found so far, in order of position.

    Attributes:
        k: number of coordinates wanted.
        bound: the key that a coordinate has to reach to be of interest.
        count: number of candidates.
    """

    def __init__(self, k: int, bound: int) -> None:
        self.k, self.bound, self.count = k, bound, 0
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, positions: Tensor, keys: Tensor) -> None:
        """Positions (int64 ``[m]``), ascending and above all earlier ones, and their keys (int32 ``[m]``)."""
        self._parts.append((positions, keys))
        self.count += keys.numel()

    def prune(self) -> None:
        """Keep the k largest: these beat whatever comes later with no larger key, so that the bound rises."""
        positions, keys = self.joined()
        chosen, threshold = choose(keys, self.k)
        if threshold >= 0:
            self._parts, self.count = [(positions[chosen], keys[chosen])], self.k
            self.bound = min(max(self.bound, threshold + 1), LARGEST_KEY)

    def joined(self) -> tuple[Tensor, Tensor]:
        """(positions, keys) of all."""
        if not self._parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
        positions, keys = zip(*self._parts, strict=True)
        return torch.cat(positions), torch.cat(keys)
