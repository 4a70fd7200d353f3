"""Two pieces of one tensor, before and after: where they differ, and all counts of the difference.

Pieces are compared as integers first. Only the elements that differ, few in most updates of reinforcement learning, are
picked out and taken to float64, in which all differences and sums are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ssrctl.checkpoints.pairs import common_dtype
from ssrctl.core.bits import bit_patterns
from ssrctl.measures.maths.change import FIXED_TOLERANCES, Change, add_up
from ssrctl.measures.maths.largest_changes import LargestChanges
from ssrctl.measures.maths.ulp import count_by_powers, step_dtype, ulp_distance

# Below this, distinct bfloat16 numbers are further apart than eta times the larger one, subnormal ones included: the
# closest are a power of two and the number under it, 2^-8 of it away.
_BF16_GAP = 2**-8
_BLOCK = 1024
# Elements compared at once: their float64 copies stay near the caches.
_CHUNK = 1 << 18
# Moved elements taken at once.
_BATCH = 1 << 15


def piece_pairs(base: Tensor, tuned: Tensor) -> Iterator[PiecePair]:
    """Yield the pieces of two tensors in order; an empty piece of empty tensors.

    Args:
        base: any shape, any real dtype, on the CPU.
        tuned: the same shape; two dtypes are compared in the one that holds both exactly. ``base`` itself where both are
            known to be equal, which are not compared then.

    Raises:
        ValueError: different shapes, or complex tensors.
    """
    if base.shape != tuned.shape:
        raise ValueError(f"shapes differ: {list(base.shape)} and {list(tuned.shape)}")
    if base.is_complex() or tuned.is_complex():
        raise ValueError("complex tensors are not compared")
    ours = base.flatten().split(_CHUNK)
    yield from map(PiecePair, ours, ours if tuned is base else tuned.flatten().split(_CHUNK))


class PiecePair:
    """Flat pieces ``[n]`` of the base and the tuned tensor, and their elements ``[m]`` that differ bit for bit.

    Attributes:
        numel: n.
        where: the places of the differing elements, int64 ``[m]``, ascending.
        stored: the differing elements of (base, tuned), ``[m]`` in their own dtypes.
    """

    def __init__(self, base: Tensor, tuned: Tensor) -> None:
        self.numel, self._base = base.numel(), base
        ours, theirs = _bits(base), _bits(tuned)
        if base.dtype != tuned.dtype:
            dtype = common_dtype(base.dtype, tuned.dtype)
            self._base = base.to(dtype)
            self.where = np.flatnonzero(_bits(self._base) != _bits(tuned.to(dtype)))
        else:
            self.where = np.empty(0, np.int64) if tuned is base else np.flatnonzero(ours != theirs)
        # torch indexes fewer dtypes than it stores
        self.stored = tuple(
            torch.from_numpy(bits.take(self.where)).view(dtype)
            for bits, dtype in ((ours, base.dtype), (theirs, tuned.dtype))
        )

    @property
    def moved(self) -> Moved:
        """The differing elements."""
        return Moved(*self.stored)

    def base_norm(self, room: Tensor) -> tuple[float, int, int]:
        """Return (sum of squares of the base's finite weights in float64, number of NaN, of infinite weights).

        Args:
            room: float32, at least as long as the piece, to be written to.
        """
        total = self._base_sum_sq(room)
        if math.isfinite(total):
            return total, 0, 0
        base = self._base.to(torch.float64)
        odd = _count(base.isnan().numpy()), _count(base.isinf().numpy())
        return float(base[base.isfinite()].square().sum()), *odd

    def _base_sum_sq(self, room: Tensor) -> float:
        """Return the sum in float64; of 16-bit weights of usual size blocks are summed in float32, to six digits."""
        if self._base.element_size() == 2 and self._base.is_floating_point() and self.numel % _BLOCK == 0:
            rows = room[: self.numel].copy_(self._base).view(-1, _BLOCK)
            total = float(torch.linalg.vector_norm(rows, dim=1).to(torch.float64).square().sum())
            if 1e-20 < total < 1e20:  # far from the limits of float32
                return total
        wide = self._base.to(torch.float64)
        return float(wide.dot(wide))


class Moved:
    """Elements ``[m]`` of the base and the tuned tensor that differ bit for bit.

    Attributes:
        before, after: float64 ``[m]``.
        difference: float64 ``[m]``, ``|after - before|``; NaN and infinity where one of the two is.

    Args:
        base: ``[m]``, any real dtype.
        tuned: ``[m]``.
    """

    def __init__(self, base: Tensor, tuned: Tensor) -> None:
        self._dtype = common_dtype(base.dtype, tuned.dtype)
        self._stored = base, tuned
        self._ours, self._theirs = (one.to(self._dtype) for one in self._stored)
        self.before, self.after = (one.to(torch.float64).numpy() for one in (self._ours, self._theirs))
        with np.errstate(invalid="ignore", over="ignore"):
            self.difference: np.ndarray = self.after - self.before
        np.abs(self.difference, out=self.difference)

    def within(self, atol: float) -> np.ndarray:
        """Return bool ``[m]``, True = the differing weight is unchanged by the fixed tolerance."""
        unchanged: np.ndarray = self.difference <= atol
        return unchanged

    def same_bf16(self, eta: float) -> np.ndarray:
        """Return bool ``[m]``, True = the differing weight is unchanged by the bf16-aware rule (Zhu et al. 2025, def. 2.1)."""
        if not self._dtype.is_floating_point:
            return np.zeros(len(self.before), dtype=bool)
        a, b, difference = self.before, self.after, self.difference
        if self._dtype != torch.bfloat16:
            a, b = (one.to(torch.bfloat16).to(torch.float64).numpy() for one in (self._ours, self._theirs))
            with np.errstate(invalid="ignore"):
                difference = np.abs(b - a)
        # An infinite distance is never within, though it is no more than eta times an infinite weight.
        within = (difference <= eta * np.maximum(np.abs(a), np.abs(b))) & (difference < np.inf)
        unchanged: np.ndarray = within | (a == b)
        return unchanged

    def change(self, atol: float, eta: float) -> Change:
        """Return the counts and sums over the elements, without their number and the base's, which ``Tally`` has.

        Args:
            atol: fixed tolerance of ``num_within``, 0 or more.
            eta: relative tolerance of ``num_same_bf16``, 0 or more.
        """
        kept, odd = self.difference, {}
        sum_sq = _sum_of_squares(kept)
        finite = math.isfinite(sum_sq)
        if not finite:
            kept = kept[np.isfinite(kept)]
            sum_sq = _sum_of_squares(kept)
            for kind, test in (("nan", np.isnan), ("inf", np.isinf)):
                odd[f"num_{kind}_tuned"] = _count(test(self.after)) - _count(test(self.before))
        within = self._counts_within({atol, *FIXED_TOLERANCES})
        below, ulps = self._steps(finite)
        return Change(
            num_within=within[atol],
            nums_within=tuple(within[one] for one in FIXED_TOLERANCES),
            num_same_bf16=below if finite and self._bf16_rule_is_equality(eta) else _count(self.same_bf16(eta)),
            num_finite=len(kept),
            sum_abs=float(kept.sum()),
            max_abs=float(kept.max(initial=0.0)),
            sum_sq=sum_sq,
            ulps=ulps,
            num_below_step=below,
            num_from_zero=_count((self.before == 0) & (self.after != 0)),
            num_sign_flipped=_count(np.sign(self.before) * np.sign(self.after) < 0),
            **odd,
        )

    def _counts_within(self, tolerances: set[float]) -> dict[float, int]:
        """Count the differing weights within each tolerance; none are once a larger tolerance has none."""
        found, last = {}, 1
        for tolerance in sorted(tolerances, reverse=True):
            last = last and _count(self.within(tolerance))
            found[tolerance] = last
        return found

    def _bf16_rule_is_equality(self, eta: float) -> bool:
        """Return True if finite weights are unchanged exactly where no step lies between them (cor. E.4)."""
        return all(one.dtype == torch.bfloat16 for one in self._stored) and eta < _BF16_GAP

    def _steps(self, finite: bool) -> tuple[int, tuple[int, ...]]:
        """Count the differing weights at distance 0, and the others by powers of two, in the narrower dtype.

        Weights that were 0 are not among the latter. Weights that are NaN or infinite in it are left out; ``finite`` promises that none are in the wider one.
        """
        dtype = step_dtype(self._stored[0].dtype, self._stored[1].dtype)
        if dtype is None:  # the codes of quantised weights have no neighbours
            return 0, ()
        ours, theirs = (one.to(dtype) for one in self._stored)
        nonzero = self.before != 0
        if not finite or dtype != self._dtype:  # rounding to the narrower one may overflow
            good = ours.to(torch.float64).isfinite() & theirs.to(torch.float64).isfinite()
            ours, theirs, nonzero = ours[good], theirs[good], nonzero[good.numpy()]
        distances = ulp_distance(ours, theirs)
        return distances.size - _count(distances), count_by_powers(distances[nonzero])


class Tally:
    """The counts and sums of pieces of one tensor, in order; moved elements are taken together, to save calls.

    Args:
        name: of the tensor.
        atol, eta: tolerances, as of ``Moved.change``.
        largest: gets the largest changes.
    """

    def __init__(self, name: str, atol: float, eta: float, largest: LargestChanges) -> None:
        self._name, self._tolerances, self._largest = name, (atol, eta), largest
        self._moved: list[Change] = []
        self._where: list[np.ndarray] = []
        self._stored: list[tuple[Tensor, ...]] = []
        self._waiting = self._numel = self._num_moved = self._num_nan = self._num_inf = 0
        self._base_sum_sq = 0.0
        self._room = torch.empty(0)

    def add(self, piece: PiecePair, start: int) -> None:
        """Count a piece that begins at flat index ``start`` of the tensor; it may be overwritten afterwards."""
        if len(self._room) < piece.numel:
            self._room = torch.empty(piece.numel)
        square, num_nan, num_inf = piece.base_norm(self._room)
        self._base_sum_sq += square
        self._num_nan += num_nan
        self._num_inf += num_inf
        self._numel += piece.numel
        if len(piece.where):
            self._where.append(piece.where + start)
            self._stored.append(piece.stored)
            self._waiting += len(piece.where)
            self._num_moved += len(piece.where)
        if self._waiting >= _BATCH:
            self._flush()

    def total(self) -> Change:
        """Return the counts and sums of all pieces."""
        self._flush()
        equal = self._numel - self._num_moved
        counts = dict.fromkeys(("num_within", "num_same_bf16", "num_equal", "num_finite"), equal)
        for side in ("base", "tuned"):
            counts |= {f"num_nan_{side}": self._num_nan, f"num_inf_{side}": self._num_inf}
        within = (equal,) * len(FIXED_TOLERANCES)
        whole = Change(numel=self._numel, nums_within=within, base_sum_sq=self._base_sum_sq, **counts)  # type: ignore[arg-type]
        return add_up([whole, *self._moved])

    def _flush(self) -> None:
        if not self._waiting:
            return
        where = np.concatenate(self._where)
        moved = Moved(*(_joined(side) for side in zip(*self._stored, strict=True)))
        self._moved.append(moved.change(*self._tolerances))
        first = int(where[0])
        self._largest.add(self._name, moved.before, moved.after, where - first, first)
        self._where, self._stored, self._waiting = [], [], 0


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Return the concatenation; torch concatenates fewer dtypes than it stores."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([bit_patterns(one) for one in parts]).view(parts[0].dtype)


def _sum_of_squares(values: np.ndarray) -> float:
    vector = torch.from_numpy(values)  # whose product keeps to the threads that torch was given
    return float(vector.dot(vector))


def _bits(tensor: Tensor) -> np.ndarray:
    return bit_patterns(tensor).numpy()


def _count(flags: np.ndarray) -> int:
    return int(np.count_nonzero(flags))
