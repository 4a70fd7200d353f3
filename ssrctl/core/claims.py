"""The coordinates that the units of one question claim, and the kept gradient values (SSR algorithm 2, lines 5-10).

An *allocation* decides that. ``disjoint`` is the paper's; the others are its controls: they show what
disjointness buys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssrctl.core.bits import bits_from_indices, set_bits
from ssrctl.core.block_selection import recall, select_blocks
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.topk import select_topk

Gradients = Mapping[str, Tensor]
Indices = dict[str, Tensor]
Bits = dict[str, Tensor]


@dataclass
class KeptUnit:
    """The part of a unit's gradient that is kept until the batch is applied.

    Attributes:
        sets: by parameter name, the coordinates whose gradient is kept.
        values: by parameter name, the gradient there, ``[k]`` in the gradient's dtype, in index order.
    """

    sets: dict[str, IndexSet] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Kept coordinates."""
        return sum(chosen.count for chosen in self.sets.values())

    @property
    def num_bytes(self) -> int:
        """Memory that the sets and the values take."""
        held = sum(values.numel() * values.element_size() for values in self.values.values())
        return held + sum(chosen.num_bytes for chosen in self.sets.values())

    def keep(self, gradients: Gradients, chosen: Mapping[str, Tensor]) -> None:
        """Keep the gradients at ``chosen`` (ascending flat indices by name); no name may come twice."""
        for name, indices in chosen.items():
            if indices.numel() and name in gradients:
                assert name not in self.sets, name
                self.sets[name] = IndexSet.from_indices(indices, gradients[name].numel())
                self.values[name] = gradients[name].reshape(-1)[indices]

    def rms(self) -> float:
        """Root mean square of the kept values; 0 when nothing is kept."""
        square = sum(float(values.double().square().sum()) for values in self.values.values())
        return (square / self.count) ** 0.5 if self.count else 0.0


@dataclass(frozen=True)
class Tally:
    """Counts over selections.

    Attributes:
        recalls: with block selection, per selection the share of the exact set that it found.
        num_missing: coordinates asked for that were not there to take.
        num_reused: coordinates taken although an earlier unit of the question had claimed them.
    """

    recalls: tuple[float, ...] = ()
    num_missing: int = 0
    num_reused: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.recalls + other.recalls, self.num_missing + other.num_missing, self.num_reused + other.num_reused
        )

    @property
    def recall(self) -> float | None:
        """Mean over selections; None when none was measured."""
        return sum(self.recalls) / len(self.recalls) if self.recalls else None


@dataclass(frozen=True)
class KeptQuestion:
    """A closed question: what its units keep, in order, and the counts of its selections."""

    units: list[KeptUnit]
    tally: Tally = Tally()


@dataclass
class Selection:
    """The selection of a unit's k coordinates.

    Attributes:
        kind: ``exact``, or ``block`` for the paper's approximation.
        reuse_factor: F of "preference, not prohibition"; None forbids reuse.
        tally: counts over the selections so far.
    """

    kind: str = "exact"
    reuse_factor: float | None = None
    tally: Tally = Tally()

    def best(self, gradients: Gradients, k: int, barred: Mapping[str, Tensor]) -> Indices:
        """Return the (about) k largest |g| outside ``barred`` (bits, True = not eligible)."""
        chosen = SELECTIONS[self.kind](gradients, k, barred)
        recalls = (recall(chosen, select_topk(gradients, k, barred)),) if self.kind != "exact" and k else ()
        self.tally += Tally(recalls, k - sum(indices.numel() for indices in chosen.values()))
        return chosen


SELECTIONS: dict[str, Callable[[Gradients, int, Mapping[str, Tensor]], Indices]] = {
    "exact": select_topk,
    "block": select_blocks,
}


class Claims:
    """The ``disjoint`` allocation: a unit takes the largest |g| among the unclaimed coordinates.

    Args:
        protected: bits by parameter name (True = never taken); an absent name has none. Not changed.
        selection: selects, and adds to its tally.

    Between ``open_unit`` calls, ``take`` may be called once for all tensors or once per tensor.
    """

    #: the gradients of all units add up in ``parameter.grad`` and are selected from at the end
    pools = False

    def __init__(self, protected: Mapping[str, Tensor], selection: Selection) -> None:
        self.protected, self.selection = protected, selection
        self.taken: Bits = {name: bits.clone() for name, bits in protected.items()}
        self.units: list[KeptUnit] = []

    def open_unit(self) -> None:
        """Begin the next unit."""
        self.units.append(KeptUnit())

    def take(self, gradients: Gradients, k: int) -> Indices:
        """Take ``k`` coordinates for the open unit; fewer when fewer are free.

        Returns:
            Ascending flat indices by name, int64.

        Raises:
            NonFiniteGradient: NaN or infinity among the eligible; nothing is taken then.
        """
        chosen = self.selection.best(gradients, k, self.taken)
        if self.selection.reuse_factor is not None:
            chosen = self._with_reuse(gradients, chosen, k, self.selection.reuse_factor)
        self._mark(gradients, chosen)
        self.units[-1].keep(gradients, chosen)
        return chosen

    def finish(self, gradients: Gradients) -> None:
        """Finish after the last unit, with the gradients left in ``parameter.grad``."""

    def _mark(self, gradients: Gradients, chosen: Indices) -> None:
        for name, indices in chosen.items():
            if not indices.numel():
                continue
            if name in self.taken:
                set_bits(self.taken[name], indices)
            else:
                self.taken[name] = bits_from_indices(indices, gradients[name].numel())

    def _with_reuse(self, gradients: Gradients, free: Indices, k: int, factor: float) -> Indices:
        """Let claimed coordinates displace free ones, smallest first, that are ``factor`` times smaller."""
        claimed = {
            name: ~bits | self.protected[name] if name in self.protected else ~bits for name, bits in self.taken.items()
        }
        known = {name: gradient for name, gradient in gradients.items() if name in claimed}
        if not known:
            return free
        rivals = select_topk(known, k, claimed)
        names = list(gradients)
        ours, theirs = _Flat(gradients, free, names), _Flat(gradients, rivals, names)
        worst = ours.magnitudes.flip(0).sort(stable=True)  # of equals, the last goes first
        best = theirs.magnitudes.sort(descending=True, stable=True)
        pairs = min(worst.values.numel(), best.values.numel())
        num_swaps = int((best.values[:pairs] >= factor * worst.values[:pairs]).sum())
        self.selection.tally += Tally(num_reused=num_swaps)
        out = ours.magnitudes.numel() - 1 - worst.indices[:num_swaps]
        kept = ours.without(out)
        added = theirs.only(best.indices[:num_swaps])
        return {name: torch.cat([kept[name], added[name]]).sort().values for name in names}


class _Flat:
    """Selected coordinates of several tensors in one row, with their magnitudes in float64."""

    def __init__(self, gradients: Gradients, chosen: Mapping[str, Tensor], names: list[str]) -> None:
        device = next(iter(gradients.values())).device
        none = torch.empty(0, dtype=torch.int64, device=device)
        self.names, self.parts = names, [chosen.get(name, none) for name in names]
        values = [gradients[n].reshape(-1)[part].double().abs() for n, part in zip(names, self.parts, strict=True)]
        self.magnitudes = torch.cat(values)

    def only(self, places: Tensor) -> Indices:
        chosen = torch.zeros(self.magnitudes.numel(), dtype=torch.bool, device=self.magnitudes.device)
        chosen[places] = True
        split = chosen.split([part.numel() for part in self.parts])
        return {name: part[keep] for name, part, keep in zip(self.names, self.parts, split, strict=True)}

    def without(self, places: Tensor) -> Indices:
        rest = torch.ones(self.magnitudes.numel(), dtype=torch.bool, device=self.magnitudes.device)
        rest[places] = False
        return self.only(rest.nonzero().flatten())


class OverlappingClaims(Claims):
    """The ``overlap`` control: nothing is claimed, every unit takes its own largest unprotected coordinates."""

    def _mark(self, gradients: Gradients, chosen: Indices) -> None:
        pass


class PooledClaims(Claims):
    """The ``pooled`` control: one selection, of all units' budgets together, from the sum of their gradients."""

    pools = True

    def __init__(self, protected: Mapping[str, Tensor], selection: Selection) -> None:
        super().__init__(protected, selection)
        self.k = 0

    def take(self, gradients: Gradients, k: int) -> Indices:
        self.k += k
        return {}

    def finish(self, gradients: Gradients) -> None:
        self.units = []
        if gradients:
            self.open_unit()
            super().take(gradients, self.k)


class ShuffledClaims(Claims):
    """The ``shuffled`` control: units keep their gradients at each other's sets.

    Sets are claimed as in ``disjoint``, but each unit keeps its gradient at the set of the unit before it, and the
    first at that of the last. The sets, their sizes and their disjointness are those of the paper. The first
    unit's gradient is held until the last set is known.
    """

    def __init__(self, protected: Mapping[str, Tensor], selection: Selection) -> None:
        super().__init__(protected, selection)
        self.first: dict[str, Tensor] = {}
        self.before: Indices = {}

    def take(self, gradients: Gradients, k: int) -> Indices:
        chosen = self.selection.best(gradients, k, self.taken)
        self._mark(gradients, chosen)
        if len(self.units) == 1:
            self.first = {name: gradient.clone() for name, gradient in gradients.items()}
        else:
            self.units[-1].keep(gradients, self.before)
        self.before = chosen
        return chosen

    def finish(self, gradients: Gradients) -> None:
        if self.units:
            self.units[0].keep(self.first, self.before)
        self.first = {}


ALLOCATIONS: dict[str, type[Claims]] = {
    "disjoint": Claims,
    "overlap": OverlappingClaims,
    "pooled": PooledClaims,
    "shuffled": ShuffledClaims,
}
