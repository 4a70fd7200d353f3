"""Reading of gradients for exact selection in plain torch: window by window, with scratch memory for one window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.bits import unpack_bits
from ssrctl.core.counting import HIGH_BINS, PATTERN_DTYPES, Candidates, keys_of, pattern_bound
from ssrctl.core.layout import Layout

CHUNK = 1 << 21  # coordinates read at once on a CPU, so that their patterns stay in its cache; a multiple of 8
DEVICE_CHUNK = 1 << 25  # and on other devices, where every window waits for the device
LANES = (8, 72)  # patterns that share a maximum; for k = 1% most maxima are below the bound with 8, with 72 few are
# torch shares out larger operations among threads. Where cores are busy each waits for its slowest thread, and small
# tensors are many: they are read in parts that one thread takes.
GRAIN = 1 << 15
SMALL = 1 << 17
ONE_CORE = 1 << 24  # coordinates of which one core finds a few without help


@dataclass(frozen=True)
class _Window:
    """Neighbouring positions that are read together: a part of one tensor, or several small tensors.

    Attributes:
        base: the first position, a multiple of 8.
        size: positions covered, among them the gaps between tensors.
        dtype: of the gradients of all pieces.
        pieces: (place in the window, integer patterns with their sign, of any shape and strides).
        bits: uint8 ``[ceil(size / 8)]``, set = not eligible; None when all are eligible.
    """

    base: int
    size: int
    dtype: torch.dtype
    pieces: list[tuple[int, Tensor]]
    bits: Tensor | None


class PlainReader:
    """A ``topk.Reader`` for any device."""

    def __init__(self, gradients: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
        self.gradients, self.taken = gradients, taken
        self.layout = Layout(gradients, align=8)
        self._chunk = CHUNK if all(g.device.type == "cpu" for g in gradients.values()) else DEVICE_CHUNK
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._windows = list(self._plan())
        self._read: _Window | None = None  # whose patterns the buffer holds

    def histogram(self, stride: int) -> Tensor:
        """See ``topk.Reader``."""
        counts = []
        read = stride == 1 or len(self._windows) == 1
        for keys in self._all_keys(stride) if read else [self._sampled_keys(stride)]:
            # a negative key is counted in a bin before the first, which is cut off
            bins = (keys >> 16).clamp_(min=-1).add_(1)
            counts.append(torch.bincount(bins, minlength=HIGH_BINS + 1)[1:].cpu())
        return sum(counts[1:], counts[0]) if counts else torch.zeros(HIGH_BINS, dtype=torch.int64)

    def collect(self, bound: int, k: int) -> tuple[Tensor, Tensor]:
        """See ``topk.Reader``."""
        found = Candidates(k, bound)
        for positions, keys in self.hits(found):
            found.add(positions, keys)
            if found.count > 2 * k + self._chunk // 2:
                found.prune()
        return found.joined()

    def hits(self, wanted: Candidates) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, keys) of eligible coordinates that reach ``wanted.bound``, which may rise meanwhile."""
        few = 1280 * wanted.k <= self.layout.size <= ONE_CORE and self._chunk == CHUNK
        for window in self._windows:
            bound = pattern_bound(wanted.bound, window.dtype)
            places, patterns = _at_least(self._patterns(window), bound, wanted.k, few=few)
            yield places + window.base, keys_of(patterns, window.dtype)

    def _all_keys(self, stride: int) -> Iterator[Tensor]:
        """int32 keys of every window, at multiples of ``stride`` (1, or with one window any); negative: not eligible."""
        for window in self._windows:
            yield keys_of(self._patterns(window)[::stride], window.dtype)

    def _sampled_keys(self, stride: int) -> Tensor:
        """int32 keys of the coordinates at multiples of ``stride``; negative where not eligible."""
        named = list(self.gradients.items())
        first = [-offset % stride for offset in self.layout.offsets.values()]
        counts = [len(range(start, g.numel(), stride)) for start, (_, g) in zip(first, named, strict=True)]
        of_tensor, device = torch.tensor(counts), named[0][1].device
        shift = torch.tensor(first) - stride * (of_tensor.cumsum(0) - of_tensor)
        indices = stride * torch.arange(sum(counts)) + shift.repeat_interleave(of_tensor)
        places, octets = (part.to(device).split(counts) for part in (indices, indices >> 3))
        values = torch.cat([g.take(place) for (_, g), place in zip(named, places, strict=True)])
        keys = values.float().abs().view(torch.int32)
        if self.taken:
            bits = torch.cat(
                [
                    self.taken[name].take(octet) if name in self.taken else octet.to(torch.uint8).zero_()
                    for (name, _), octet in zip(named, octets, strict=True)
                ]
            )
            keys |= ((bits >> (indices & 7).to(bits)) & 1).to(torch.int32).neg_()
        return keys

    def _patterns(self, window: _Window) -> Tensor:
        """Return the patterns of |g| in a buffer that is reused; -1 where not eligible and between tensors.

        ``[window.size]``, and as many more as make it a multiple of the largest of ``LANES``.
        """
        dtype = PATTERN_DTYPES[window.dtype]
        patterns = self._buffer(dtype)[: -(-window.size // LANES[1]) * LANES[1]]
        if self._read is window:  # small models have one window, which is counted and then collected
            return patterns
        ends = [place + piece.numel() for place, piece in window.pieces]
        for end, following in zip(ends, [*(place for place, _ in window.pieces[1:]), patterns.numel()], strict=True):
            if end < following:
                patterns[end:following] = -1
        all_but_the_sign = torch.tensor(torch.iinfo(dtype).max, dtype=dtype, device=patterns.device)
        for place, piece in window.pieces:
            target = patterns[place : place + piece.numel()].view(piece.shape)
            rows = GRAIN // piece[0].numel() - 1 if len(window.pieces) > 1 and piece.numel() <= SMALL else len(piece)
            for part, out in zip(piece.split(max(1, rows)), target.split(max(1, rows)), strict=True):
                torch.bitwise_and(part, all_but_the_sign, out=out)
        if window.bits is not None and bool(window.bits.any()):
            # an OR with -1 does what masked_fill does, several times as fast
            patterns[: window.size] |= unpack_bits(window.bits, 0, window.size).to(dtype).neg_()
        self._read = window
        return patterns

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._scratch:
            largest = max(window.size for window in self._windows if PATTERN_DTYPES[window.dtype] == dtype)
            device = next(iter(self.gradients.values())).device
            self._scratch[dtype] = torch.empty(largest + LANES[1], dtype=dtype, device=device)
        return self._scratch[dtype]

    def _plan(self) -> Iterator[_Window]:
        """Windows of at most about ``chunk`` positions of one dtype, in order."""
        opened: list[tuple[int, Tensor, Tensor | None]] = []
        base, dtype = 0, torch.float32
        for position, gradient, patterns, bits in self._pieces():
            full = position + patterns.numel() - base > self._chunk
            if opened and (full or gradient.dtype != dtype):
                yield _window(base, dtype, opened)
                opened = []
            if not opened:
                base, dtype = position, gradient.dtype
            opened.append((position - base, patterns, bits))
        if opened:
            yield _window(base, dtype, opened)

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """(position, tensor, patterns, bits) of parts of tensors, each from a multiple of 8 within its tensor."""
        for (name, gradient), offset in zip(self.gradients.items(), self.layout.offsets.values(), strict=True):
            if gradient.numel() == 0:
                continue
            patterns = gradient.view(PATTERN_DTYPES[gradient.dtype])
            # Strided tensors are read by rows, as a flat view of them does not exist.
            patterns = patterns.view(-1) if patterns.is_contiguous() else patterns
            row = patterns[0].numel()
            rows = max(8, self._chunk // row // 8 * 8)
            for first in range(0, patterns.shape[0], rows):
                start, part = first * row, patterns[first : first + rows]
                bits = self.taken[name][start // 8 : -(-(start + part.numel()) // 8)] if name in self.taken else None
                yield offset + start, gradient, part, bits


def _at_least(patterns: Tensor, least: int, k: int, *, few: bool) -> tuple[Tensor, Tensor]:
    """(ascending indices, patterns) of the patterns (``[n]``, n a multiple of both ``LANES``) that are at least ``least``.

    With ``k``, of those that equal ``least`` the first k are enough. Where most patterns reach it (an embedding's
    gradient may be 0 but for a few rows) the others are left out, which keeps the scratch small.

    Comparing all and listing the hits costs several times what a maximum does. So maxima of some ``LANES`` patterns
    at the same place of as many equal parts are compared, and then only patterns at places with a hit.
    """
    lanes = patterns.view(LANES[few], -1)
    width = GRAIN // LANES[few] - 1 if few else max(1, lanes.shape[1])
    maxima = torch.cat([part.amax(0) for part in lanes.split(width, 1)])
    places = (maxima >= least).nonzero().flatten()
    if 2 * places.numel() > lanes.shape[1]:
        chosen = patterns >= least
        if 0 < k < patterns.numel():
            ties = patterns == least
            chosen &= ~(ties & (ties.cumsum(0, dtype=torch.int32) > k))
        indices = chosen.nonzero().flatten()
        return indices, patterns[indices]
    found = []
    for part in places.split(width):
        near = lanes.index_select(1, part)  # indexing would start threads from 3,000 values on
        reached = near >= least
        lane, which = reached.nonzero(as_tuple=True)  # by lane, then by place: ascending
        found.append((lane * lanes.shape[1] + part.index_select(0, which), near.masked_select(reached)))
    if len(found) == 1:
        return found[0]
    indices, order = torch.cat([one for one, _ in found]).sort()
    return indices, torch.cat([values for _, values in found]).index_select(0, order)


def _window(base: int, dtype: torch.dtype, pieces: list[tuple[int, Tensor, Tensor | None]]) -> _Window:
    """Join neighbouring pieces: (place, patterns, bits)."""
    places = [(place, patterns) for place, patterns, _ in pieces]
    place, patterns, bits = pieces[-1]
    size = place + patterns.numel()
    if len(pieces) > 1 and any(part is not None for _, _, part in pieces):
        # a piece begins at a whole byte, and the last byte of its bits also covers the gap after it
        bits = torch.cat([p.new_zeros(-(-p.numel() // 8), dtype=torch.uint8) if b is None else b for _, p, b in pieces])
    return _Window(base, size, dtype, places, bits)
