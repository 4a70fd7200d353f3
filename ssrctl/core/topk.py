"""The k largest |g| among eligible coordinates over many tensors: exact and deterministic, by counting.

The bit pattern of |x| orders like |x| itself for every IEEE float. The top 16 bits of a float32 pattern
(all 16 of a bfloat16 or float16) are counted in one histogram of 32,768 bins; the bin in which the k-th
largest falls is known from the cumulative counts, and float32 counts its lower 16 bits once more inside that
bin. No sort, no copy of the whole gradient: tensors are read in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssrctl.core.bits import unpack_bits

CHUNK = 1 << 22  # coordinates read at once: 16 MiB of float32, a few times that of scratch
HIGH_BINS = 1 << 15
LOW_BINS = 1 << 16


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity; ``name`` is the tensor."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"the gradient of {name} has {count} values that are NaN or infinite")
        self.name = name


def select_topk(
    gradients: Mapping[str, Tensor], k: int, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Select the ``k`` coordinates with the largest |g| that are not taken.

    Ties at the threshold go to the lowest (tensor in the mapping's order, flat index). Zero gradients are
    eligible like any other magnitude.

    Args:
        gradients: tensors of any shape; all float32, or all of one of bfloat16 and float16.
        k: how many, at least 0. When fewer are eligible, all of these are selected.
        taken: bits per tensor as in ``core.bits`` (set = not eligible); a name without bits is all eligible.

    Returns:
        Ascending flat indices, int64 ``[k_t]``, for every tensor; the ``k_t`` sum to ``min(k, eligible)``.

    Raises:
        ValueError: negative k, or mixed dtypes.
        NonFiniteGradient: NaN or infinity in an eligible coordinate.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    dtypes = {gradient.dtype for gradient in gradients.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"expected gradients of one dtype among float32, bfloat16, float16; got {sorted(map(str, dtypes))}"
        )
    source = _Source(gradients, taken or {})
    if k == 0 or not gradients:
        return {name: torch.empty(0, dtype=torch.int64, device=g.device) for name, g in gradients.items()}
    wide = dtypes == {torch.float32}
    counts = source.histogram(lambda pattern: pattern >> 16 if wide else pattern, HIGH_BINS)
    source.check_finite(counts, wide)
    if int(counts.sum()) <= k:
        return source.collect(threshold=-1, num_ties=0)
    threshold, above = _threshold_bin(counts, k)
    if wide:
        high = threshold
        low = source.histogram(lambda p: torch.where(p >> 16 == high, p & 0xFFFF, -1), LOW_BINS)
        low_bin, above_low = _threshold_bin(low, k - above)
        threshold, above = (high << 16) | low_bin, above + above_low
    return source.collect(threshold, num_ties=k - above)


def _threshold_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in higher bins (fewer than k)."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, above


class _Source:
    """Chunks of magnitude patterns of the eligible coordinates, in (tensor, index) order."""

    def __init__(self, gradients: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
        self.gradients = {name: gradient.detach().reshape(-1) for name, gradient in gradients.items()}
        self.taken = taken

    def patterns(self, name: str) -> list[tuple[int, int]]:
        size = self.gradients[name].numel()
        return [(start, min(size, start + CHUNK)) for start in range(0, size, CHUNK)]

    def chunk(self, name: str, start: int, stop: int) -> Tensor:
        """int32 patterns of |g|, -1 where taken."""
        values = self.gradients[name][start:stop]
        if values.dtype == torch.float32:
            pattern = values.view(torch.int32) & 0x7FFFFFFF
        else:
            pattern = (values.view(torch.int16) & 0x7FFF).to(torch.int32)
        if name in self.taken:
            pattern = pattern.masked_fill(unpack_bits(self.taken[name], start, stop), -1)
        return pattern

    def histogram(self, bin_of: object, num_bins: int) -> Tensor:
        """int64 ``[num_bins]`` counts over all tensors; what maps to -1 is left out."""
        total = torch.zeros(num_bins, dtype=torch.int64)
        for name in self.gradients:
            for start, stop in self.patterns(name):
                bins = bin_of(self.chunk(name, start, stop))  # type: ignore[operator]
                total += torch.bincount(bins + 1, minlength=num_bins + 1)[1:].cpu()
        return total

    def check_finite(self, counts: Tensor, wide: bool) -> None:
        """NaN and infinity have the largest patterns, so the histogram shows at once whether there are any."""
        dtype = next(iter(self.gradients.values())).dtype
        infinity = int(torch.tensor(float("inf"), dtype=dtype).view(torch.int32 if wide else torch.int16))
        if int(counts[infinity >> 16 if wide else infinity :].sum()) == 0:
            return
        for name in self.gradients:
            # what is taken has the pattern -1, so that a NaN there is not blamed
            bad = sum(int((self.chunk(name, *part) >= infinity).sum()) for part in self.patterns(name))
            if bad:
                raise NonFiniteGradient(name, bad)

    def collect(self, threshold: int, num_ties: int) -> dict[str, Tensor]:
        """Indices with a pattern above ``threshold``, and the first ``num_ties`` that equal it."""
        selected = {}
        for name, gradient in self.gradients.items():
            parts = []
            for start, stop in self.patterns(name):
                pattern = self.chunk(name, start, stop)
                chosen = pattern > threshold
                if num_ties:
                    ties = (pattern == threshold).nonzero().flatten()[:num_ties]
                    chosen[ties] = True
                    num_ties -= ties.numel()
                parts.append(chosen.nonzero().flatten() + start)
            selected[name] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=gradient.device)
        return selected
