"""The weights that changed most, in absolute terms and relative to their size."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

DEFAULT_COUNT = 20
_TINY = 5e-324


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """One weight that changed.

    Attributes:
        name: its tensor.
        index: flat, row by row, from 0.
        before, after: its values, finite.
    """

    name: str
    index: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def relative_change(self) -> float | None:
        """``|after - before| / |before|``; None when the weight was 0."""
        return abs(self.change) / abs(self.before) if self.before else None

    def position(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the index along each dimension of a tensor of this shape."""
        place, rest = [], self.index
        for size in reversed(shape):
            rest, along = divmod(rest, size)
            place.append(along)
        return tuple(reversed(place))


class LargestChanges:
    """The ``count`` largest of all changes that were added, by two criteria, in bounded memory.

    Ties go to the lower name, then to the lower index, so the order in which pieces are added does not matter.

    Attributes:
        count: number of changes kept by each criterion.
        absolute: by ``|after - before|``, largest first.
        relative: by ``|after - before| / |before|``, largest first; weights that were 0 are left out.
    """

    def __init__(self, count: int = DEFAULT_COUNT, floors: tuple[float, float] = (-1.0, -1.0)) -> None:
        """Keep nothing yet.

        Args:
            count: at least 1.
            floors: sizes by the two criteria below which a change need not be kept, from others that were found
                elsewhere (``floors`` of theirs).
        """
        if count < 1:
            raise ValueError(f"at least one change is kept, not {count}")
        self.count = count
        self._given = floors
        self.absolute: list[WeightChange] = []
        self.relative: list[WeightChange] = []

    @property
    def floors(self) -> tuple[float, float]:
        """The sizes by the two criteria that a change needs at least to be kept."""
        sizes = ((self.absolute, _by_change), (self.relative, _by_relative_change))
        own = (key(kept[-1]) if len(kept) == self.count else -1.0 for kept, key in sizes)
        absolute, relative = (max(pair) for pair in zip(self._given, own, strict=True))
        return absolute, relative

    def add(self, name: str, before: np.ndarray, after: np.ndarray, indices: np.ndarray, start: int = 0) -> None:
        """Consider some coordinates of one tensor.

        Args:
            name: of the tensor.
            before: float64 ``[n]``.
            after: float64 ``[n]``; where the difference is not finite the coordinate is left out.
            indices: int64 ``[n]``, ascending.
            start: flat index in the tensor of index 0.
        """
        if not len(before):
            return
        with np.errstate(all="ignore"):
            change = np.abs(after - before)
            # The smallest positive number instead of 0 makes that quotient overflow, and no other.
            relative = change / np.maximum(np.abs(before), _TINY)
        criteria = ((self.absolute, change, _by_change), (self.relative, relative, _by_relative_change))
        for (kept, size, key), floor in zip(criteria, self.floors, strict=True):
            largest = size.max()
            # A tie with the last one that is kept wins only if it lies before it.
            tied = largest == floor and len(kept) == self.count
            if largest < floor or (tied and (name, start) > (kept[-1].name, kept[-1].index)):
                continue
            chosen = self._candidates(size, floor, before != 0 if key is _by_relative_change else None)
            places = indices[chosen]
            values = zip(places.tolist(), before[chosen].tolist(), after[chosen].tolist(), strict=True)
            found = [WeightChange(name=name, index=start + place, before=old, after=new) for place, old, new in values]
            kept[:] = _first(self.count, [*kept, *found], key)

    def _candidates(self, size: np.ndarray, floor: float, allowed: np.ndarray | None) -> np.ndarray:
        """Return the ascending places of the ``count`` largest finite sizes above 0 from ``floor`` on; ties: the first."""
        good = (size >= floor) & (size > 0) & (size < np.inf)
        places: np.ndarray = np.flatnonzero(good if allowed is None else good & allowed)
        if len(places) <= self.count:
            return places
        sizes = size[places]
        last = np.partition(sizes, -self.count)[-self.count]
        above, ties = np.flatnonzero(sizes > last), np.flatnonzero(sizes == last)
        largest: np.ndarray = places[np.sort(np.concatenate([above, ties[: self.count - len(above)]]))]
        return largest

    def merge(self, other: LargestChanges) -> None:
        """Add the changes that another one found in other coordinates."""
        self.absolute = _first(self.count, [*self.absolute, *other.absolute], _by_change)
        self.relative = _first(self.count, [*self.relative, *other.relative], _by_relative_change)


def _by_change(one: WeightChange) -> float:
    return abs(one.change)


def _by_relative_change(one: WeightChange) -> float:
    return one.relative_change or 0.0


def _first(count: int, changes: Iterable[WeightChange], key: Callable[[WeightChange], float]) -> list[WeightChange]:
    return heapq.nsmallest(count, changes, key=lambda one: (-key(one), one.name, one.index))
