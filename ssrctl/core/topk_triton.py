"""Reading of gradients for exact selection on CUDA: fused Triton kernels, one launch over all tensors of a dtype.

The kernels find their tensors through tables of addresses, so that a model of hundreds of tensors costs as many
launches as one tensor. Collecting is a count per block, a prefix sum, and a write of each block's candidates to
their place, which keeps the order without a sort: two reads of the gradients, the second of which skips blocks
that hold nothing. Eligibility bits are loaded only for coordinates that reach the bound.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssrctl.core.counting import HIGH_BINS, Candidates, pattern_bound
from ssrctl.core.layout import Layout

BLOCK = 4096  # coordinates per program: 8 KiB of bfloat16
MANY = 1 << 26  # candidates beyond 2k that a pass may write at once: 0.8 GiB
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _pointers(addresses, KIND: tl.constexpr):
    """Addresses (int64) as pointers to patterns."""
    if KIND == 0:
        pointers = addresses.to(tl.pointer_type(tl.int32))
    else:
        pointers = addresses.to(tl.pointer_type(tl.int16))
    return pointers


@triton.jit
def _magnitudes(patterns, KIND: tl.constexpr):
    """int32 patterns without their sign."""
    if KIND == 0:
        magnitudes = patterns & 0x7FFFFFFF
    else:
        magnitudes = patterns.to(tl.int32) & 0x7FFF
    return magnitudes


@triton.jit
def _keys(patterns, KIND: tl.constexpr):
    """int32 keys of patterns, as ``counting.keys_of``."""
    if KIND == 0:
        keys = patterns
    elif KIND == 1:
        keys = patterns << 16
    else:
        keys = patterns.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return keys


@triton.jit
def _eligible(bit_addresses, offsets, wanted):
    """Return the wanted offsets that are not taken; a tensor with address 0 has no bits."""
    has_bits = wanted & (bit_addresses + tl.zeros_like(offsets) != 0)
    bits = tl.load(bit_addresses.to(tl.pointer_type(tl.uint8)) + offsets // 8, mask=has_bits, other=0)
    return wanted & (((bits.to(tl.int32) >> (offsets % 8).to(tl.int32)) & 1) == 0)


@triton.jit
def _reached(
    tables, num_tensors, tensor_of, block, bound, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return (flags of the block's eligible coordinates that reach the bound, patterns)."""
    tensor = tl.load(tensor_of + block)
    first_block = tl.load(tables + tensor)
    numel = tl.load(tables + num_tensors + tensor)
    address = tl.load(tables + 2 * num_tensors + tensor)
    bit_address = tl.load(tables + 3 * num_tensors + tensor)
    start = (block - first_block) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    pointers = _pointers(address, KIND) + offsets
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16])  # on the sum: Triton 3.7 loses a hint on the result of a function
    if start + BLOCK <= numel:  # without a mask, and aligned, a thread loads 16 bytes at once
        patterns = _magnitudes(tl.load(pointers), KIND)
    else:
        patterns = _magnitudes(tl.load(pointers, mask=offsets < numel, other=0), KIND)
    return _eligible(bit_address, offsets, (offsets < numel) & (patterns >= bound)), patterns


@triton.jit
def _count_kernel(
    tables, num_tensors, tensor_of, blocks, first, bound, counts,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``counts[block]``: eligible coordinates of a block that reach the bound; blocks before ``first`` are left out."""
    block = tl.load(blocks + tl.program_id(0))
    if block >= first:
        reached, _ = _reached(tables, num_tensors, tensor_of, block, bound, KIND, ALIGNED, BLOCK)
        tl.store(counts + block, tl.sum(reached.to(tl.int32), 0))


@triton.jit
def _write_kernel(
    tables, num_tensors, tensor_of, blocks, first, last, bound, counts, ends, positions, keys,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions and keys of what was counted in the blocks ``first..last-1``, in order."""
    block = tl.load(blocks + tl.program_id(0))
    count = tl.load(counts + block)
    if (block >= first) & (block < last) & (count > 0):
        reached, patterns = _reached(tables, num_tensors, tensor_of, block, bound, KIND, ALIGNED, BLOCK)
        places = tl.load(ends + block) - count + tl.cumsum(reached.to(tl.int32), 0) - 1
        tl.store(positions + places, block * BLOCK + tl.arange(0, BLOCK), mask=reached)
        tl.store(keys + places, _keys(patterns, KIND), mask=reached)


@triton.jit
def _histogram_kernel(
    tables, num_tensors, tensor_of, kinds, size, stride, counts,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add eligible coordinates at multiples of ``stride`` to ``counts[key >> 16]``; every lane finds its own tensor."""
    positions = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)) * stride
    inside = positions < size
    tensors = tl.load(tensor_of + positions // BLOCK, mask=inside, other=0)
    offsets = positions - tl.load(tables + tensors) * BLOCK
    inside = inside & (offsets < tl.load(tables + num_tensors + tensors)) & (tl.load(kinds + tensors) == KIND)
    pointers = _pointers(tl.load(tables + 2 * num_tensors + tensors), KIND)
    patterns = _magnitudes(tl.load(pointers + offsets, mask=inside, other=0), KIND)
    eligible = _eligible(tl.load(tables + 3 * num_tensors + tensors), offsets, inside)
    tl.atomic_add(counts + (_keys(patterns, KIND) >> 16), tl.full([BLOCK], 1, tl.int64), mask=eligible, sem="relaxed")


class TritonReader:
    """A ``topk.Reader`` for CUDA tensors."""

    def __init__(self, gradients: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
        self.gradients, self.taken = gradients, taken
        self.layout = Layout(gradients, align=BLOCK)
        self._flat = [gradient.reshape(-1) for gradient in gradients.values()]  # a strided tensor is copied
        self._bits = [taken[name].contiguous() if name in taken else None for name in gradients]
        self._device = self._flat[0].device
        self._num_blocks = self.layout.size // BLOCK
        # one copy to the device: first block, number of coordinates, address, address of the bits
        columns = [
            [offset // BLOCK for offset in self.layout.offsets.values()],
            [flat.numel() for flat in self._flat],
            [flat.data_ptr() for flat in self._flat],
            [0 if bits is None else bits.data_ptr() for bits in self._bits],
            [KINDS[flat.dtype] for flat in self._flat],
        ]
        tables = torch.tensor(columns, dtype=torch.int64).to(self._device)
        self._tables, self._kinds = tables[:4].contiguous(), tables[4].contiguous()
        num_blocks = torch.tensor([-(-flat.numel() // BLOCK) for flat in self._flat]).to(self._device)
        tensors = torch.arange(len(self._flat), device=self._device)
        self._tensor_of = tensors.repeat_interleave(num_blocks, output_size=self._num_blocks)
        self._blocks = self._blocks_by_kind()

    def histogram(self, stride: int) -> Tensor:
        """See ``topk.Reader``."""
        counts = torch.zeros(HIGH_BINS, dtype=torch.int64, device=self._device)
        programs = -(-self.layout.size // (stride * BLOCK))
        for kind, _, _ in self._blocks:
            self._launch(
                _histogram_kernel,
                programs,
                self._kinds,
                self.layout.size,
                stride,
                counts,
                KIND=KINDS[kind],
                BLOCK=BLOCK,
            )
        return counts.cpu()

    def collect(self, bound: int, k: int) -> tuple[Tensor, Tensor]:
        """See ``topk.Reader``."""
        found = Candidates(k, bound)
        first = 0
        while first < self._num_blocks:
            counts = self._count(first, found.bound)
            ends = counts.cumsum(0)
            # the blocks whose candidates fit, which are all of them unless the bound is far too low
            fits = max(1, int(torch.searchsorted(ends[first:], 2 * k + MANY, right=True)))
            self._write(found, first, first + fits, counts, ends)
            first += fits
            if first < self._num_blocks:
                found.prune()
        return found.joined()

    def _count(self, first: int, bound: int) -> Tensor:
        """int32 ``[num_blocks]``: candidates per block, 0 before block ``first``."""
        counts = torch.zeros(self._num_blocks, dtype=torch.int32, device=self._device)
        for dtype, blocks, aligned in self._blocks:
            least = pattern_bound(bound, dtype)
            constants = {"KIND": KINDS[dtype], "ALIGNED": aligned, "BLOCK": BLOCK}
            self._launch(_count_kernel, blocks.numel(), blocks, first, least, counts, **constants)
        return counts

    def _write(self, found: Candidates, first: int, last: int, counts: Tensor, ends: Tensor) -> None:
        total = int(ends[last - 1])
        positions = torch.empty(total, dtype=torch.int64, device=self._device)
        keys = torch.empty(total, dtype=torch.int32, device=self._device)
        for dtype, blocks, aligned in self._blocks:
            least = pattern_bound(found.bound, dtype)
            constants = {"KIND": KINDS[dtype], "ALIGNED": aligned, "BLOCK": BLOCK}
            outputs = (counts, ends, positions, keys)
            self._launch(_write_kernel, blocks.numel(), blocks, first, last, least, *outputs, **constants)
        found.add(positions, keys)

    def _blocks_by_kind(self) -> list[tuple[torch.dtype, Tensor, bool]]:
        """Per dtype: which blocks hold it (int64, ascending), and whether all its tensors start at 16 bytes."""
        made = []
        for dtype, kind in KINDS.items():
            addresses = [flat.data_ptr() for flat in self._flat if flat.dtype == dtype and flat.numel()]
            if addresses:
                blocks = (self._kinds[self._tensor_of] == kind).nonzero().flatten()
                made.append((dtype, blocks, all(address % 16 == 0 for address in addresses)))
        return made

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            kernel[(programs,)](self._tables, len(self._flat), self._tensor_of, *arguments, **constants)


@cache
def usable(device: torch.device) -> bool:
    """Return whether kernels can be compiled and run here; warn, once, why not (as when there is no C compiler)."""
    reader = TritonReader({"": torch.tensor([1.0, 3.0], device=device)}, {})
    try:
        positions, _ = reader.collect(0x40000000, 1)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        warnings.warn(f"Triton does not work on {device}, so that selection is in plain torch: {error}", stacklevel=2)
        return False
    return positions.tolist() == [1]
