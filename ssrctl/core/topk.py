"""The k largest |g| among eligible coordinates over many tensors: exact and deterministic, by counting.

``core.counting`` finds a threshold from counts of keys (the float32 patterns of |g|). Counting every coordinate
and then collecting those above the threshold would read the gradients twice. Instead a sample gives a lower
*bound* on the threshold; one pass collects the eligible coordinates that reach it (the candidates, little more
than k), and only these are counted exactly. Where the sample misled, so that there are fewer than k candidates,
all coordinates are counted to get the bound. The result is exact either way. There is no sort and no copy of the
gradients, and counts add up over processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ssrctl.core.counting import INFINITY, PATTERN_DTYPES, Candidates, Group, choose, number_of, threshold_bin
from ssrctl.core.layout import Layout
from ssrctl.core.topk_plain import CHUNK, PlainReader

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CHUNK", "NonFiniteGradient", "Reader", "count_non_finite", "select_topk"]

SAMPLED_FROM = 1 << 18  # coordinates from which sampling is cheaper than counting all
SAMPLE = 1 << 15  # coordinates in a sample
MARGIN = 5.0  # how far below the wanted rank the bound is set, in standard deviations of the sample's count


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity.

    Attributes:
        name: the tensor.
        count: number of its eligible coordinates.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"the gradient of {name} has {count} values that are NaN or infinite")
        self.name = name
        self.count = count


class Reader(Protocol):
    """A way to read gradients.

    Attributes:
        gradients: tensors without autograd history.
        taken: bits per tensor as in ``core.bits``.
        layout: maps positions to tensors.
    """

    gradients: Mapping[str, Tensor]
    taken: Mapping[str, Tensor]
    layout: Layout

    def histogram(self, stride: int) -> Tensor:
        """int64 ``[HIGH_BINS]`` (CPU): eligible coordinates at multiples of ``stride``, by their key's upper bits."""

    def collect(self, bound: int, k: int) -> tuple[Tensor, Tensor]:
        """(positions, keys) of eligible coordinates whose key is at least ``bound``, by ascending position.

        All of them, or a part that includes the ``k`` largest (of equal ones, those of lowest position): what
        keeps memory in bounds where the bound lets too many pass.
        """


def select_topk(
    gradients: Mapping[str, Tensor],
    k: int,
    taken: Mapping[str, Tensor] | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Select the ``k`` coordinates with the largest |g| that are not taken.

    Ties at the threshold go to the lowest (tensor in the mapping's order, rank in the process group, flat index): where
    the processes hold the rows of each tensor in the order of their ranks, to the lowest flat index of the whole tensor.
    Zero gradients are eligible like any other magnitude. Dtypes may be mixed: true magnitudes are compared.

    Args:
        gradients: tensors of any shape and strides, each float32, bfloat16 or float16, all on one device.
        k: number of coordinates, at least 0. When fewer are eligible, all of these are selected.
        taken: bits per tensor as in ``core.bits`` (set = not eligible), on the tensor's device; a name without
            bits is all eligible.
        process_group: every process of the group holds its part (which may be empty) of the same tensors, in the same
            order, and calls with the same ``k``, which counts over all of them; each gets its own part of the
            selection. None: only this process.

    Returns:
        Ascending flat indices, int64 ``[k_t]``, for every tensor, on its device; the ``k_t`` sum to
        ``min(k, eligible)``. They are views of one storage.

    Raises:
        ValueError: negative k, another dtype, tensors on different devices, bits of another size than the tensor.
        NonFiniteGradient: NaN or infinity in an eligible coordinate; in a group, every process raises it.
    """
    taken = taken or {}
    _check(gradients, k, taken)
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64, device=g.device) for name, g in gradients.items()}
    group = Group(process_group)
    reader = make_reader({name: gradient.detach() for name, gradient in gradients.items()}, taken)
    positions, keys = _candidates(reader, k, group)
    edges = None
    if process_group is not None:
        starts = torch.tensor([*reader.layout.offsets.values(), reader.layout.size], device=positions.device)
        edges = torch.searchsorted(positions, starts)
    chosen, _ = choose(keys, k, group, edges)
    return reader.layout.split(positions.masked_select(chosen))


def count_non_finite(gradient: Tensor, bits: Tensor | None = None) -> int:
    """Count the eligible values of one tensor that are NaN or infinite; ``bits`` as one entry of ``taken``."""
    reader = PlainReader({"": gradient.detach()}, {} if bits is None else {"": bits})
    return sum(positions.numel() for positions, _ in reader.hits(Candidates(0, INFINITY)))


def make_reader(gradients: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> Reader:
    """Return the fused kernels on CUDA where Triton works, plain torch otherwise; both give the same result."""
    device = next((gradient.device for gradient in gradients.values()), torch.device("cpu"))
    if device.type == "cuda":
        try:
            from ssrctl.core.topk_triton import TritonReader, usable
        except ImportError:  # Triton is optional
            return PlainReader(gradients, taken)
        if usable(device):
            return TritonReader(gradients, taken)
    return PlainReader(gradients, taken)


def _check(gradients: Mapping[str, Tensor], k: int, taken: Mapping[str, Tensor]) -> None:
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    first = next(iter(gradients), "")
    for name, gradient in gradients.items():
        if gradient.dtype not in PATTERN_DTYPES:
            raise ValueError(f"expected gradients in float32, bfloat16 or float16; that of {name} is {gradient.dtype}")
        if gradient.device != gradients[first].device:
            raise ValueError(
                f"expected all gradients on one device; that of {first} is on {gradients[first].device}, that of "
                f"{name} on {gradient.device}"
            )
        num_bytes = -(-gradient.numel() // 8)
        if name in taken and taken[name].shape != (num_bytes,):
            raise ValueError(f"{name} needs {num_bytes} bytes of bits, got a tensor of shape {list(taken[name].shape)}")


def _candidates(reader: Reader, k: int, group: Group) -> tuple[Tensor, Tensor]:
    """(positions, keys) of eligible coordinates, among them this process's part of the k largest of all."""
    size = int(group.total(torch.tensor(reader.layout.size)))
    stride = _stride(size) if size >= SAMPLED_FROM else 1
    bound = _bound(reader, k, stride, group)
    positions, keys = reader.collect(bound, k)
    _check_finite(reader, keys, group)
    if stride > 1 and bound > 0 and int(group.total(torch.tensor(keys.numel()))) < k:
        positions, keys = reader.collect(_bound(reader, k, 1, group), k)
    return positions, keys


def _stride(size: int) -> int:
    """Return a step that samples ``size`` coordinates; coprime to likely row lengths, so that no column is favoured."""
    stride = max(2, -(-size // SAMPLE))
    while math.gcd(stride, 2 * 3 * 5 * 7 * 11 * 13) > 1:
        stride += 1
    return stride


def _bound(reader: Reader, k: int, stride: int, group: Group) -> int:
    """Return a key that at least k coordinates of all processes reach: surely at stride 1, very likely above."""
    counts = group.total(reader.histogram(stride))
    rank = k if stride == 1 else math.ceil(k / stride + MARGIN * math.sqrt(k / stride) + MARGIN)
    if number_of(counts) <= rank:
        return 0
    # NaN and infinity must always be candidates: that is how they are noticed
    return min(threshold_bin(counts, rank)[0] << 16, INFINITY)


def _check_finite(reader: Reader, keys: Tensor, group: Group) -> None:
    found = None
    if keys.numel() > 0 and int(keys.max()) >= INFINITY:
        counts = ((name, count_non_finite(g, reader.taken.get(name))) for name, g in reader.gradients.items())
        found = next(pair for pair in counts if pair[1])
    if (first := group.first(found)) is not None:
        raise NonFiniteGradient(*first)
