"""The coordinates that the units of one question claim, and the kept gradient values (SSR algorithm 2, lines 5-10).

An *allocation* decides that. ``disjoint`` is the paper's; the others are its controls: they show what
disjointness buys.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssrctl.core.bits import set_bits
from ssrctl.core.block_selection import recall, select_blocks
from ssrctl.core.counting import ALONE, Group
from ssrctl.core.gradient_part import GradientPart
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.layout import Shards
from ssrctl.core.topk import select_topk

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SELECTIONS = ("exact", "block")
Gradients = Mapping[str, Tensor]
Indices = dict[str, Tensor]


@dataclass(frozen=True)
class KeptPart:
    """The part of a unit's kept gradient that lies in one shard.

    Attributes:
        shard: number of the shard.
        counts: by parameter name, kept coordinates, in the order of the values.
        chosen: positions in the shard.
        values: the gradient there, ``[k]`` in its own dtype.
    """

    shard: int
    counts: dict[str, int]
    chosen: IndexSet
    values: Tensor


class KeptUnit:
    """The part of a unit's gradient that is kept until the batch is applied.

    Args:
        shards: of the parameters.

    Attributes:
        parts: of the shards that something is kept of; several of one shard where parameters come one by one.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.parts: list[KeptPart] = []

    @property
    def sets(self) -> dict[str, IndexSet]:
        """By parameter name, the coordinates whose gradient is kept."""
        found: dict[str, IndexSet] = {}
        for part in self.parts:
            layout = self._shards.layouts[part.shard]
            indices = layout.split(part.chosen.to_indices())
            found |= {name: IndexSet.from_indices(indices[name], layout.numels[name]) for name in part.counts}
        return found

    @property
    def values(self) -> dict[str, Tensor]:
        """By parameter name, the gradient there, ``[k]`` in the gradient's dtype, in index order."""
        parts = (zip(part.counts, part.values.split(list(part.counts.values())), strict=True) for part in self.parts)
        return dict(itertools.chain.from_iterable(parts))

    @property
    def count(self) -> int:
        """Kept coordinates."""
        return sum(part.chosen.count for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Memory that the sets and the values take."""
        return sum(p.values.numel() * p.values.element_size() + p.chosen.num_bytes for p in self.parts)

    def keep(self, gradients: Gradients, chosen: Mapping[str, Tensor]) -> None:
        """Keep the gradients at ``chosen`` (ascending flat indices by name, in the parameters' order), each name once."""
        known = {name: indices for name, indices in chosen.items() if name in gradients}
        self.keep_values(known, {n: gradients[n].reshape(-1).index_select(0, indices) for n, indices in known.items()})

    def keep_values(self, chosen: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Keep ``values`` (``[k]`` by name) at ``chosen``, as ``keep`` does."""
        for number, part in self._shards.parts(chosen):
            layout = self._shards.layouts[number]
            self.parts.append(
                KeptPart(
                    number,
                    {name: indices.numel() for name, indices in part.items()},
                    IndexSet.from_indices(layout.join(part), layout.size),
                    torch.cat([values[name] for name in part]),
                )
            )

    def rms(self, group: Group = ALONE) -> float:
        """Root mean square of the kept values, over all processes of the group; 0 when nothing is kept."""
        square = sum(float(values.double().square().sum()) for values in self.values.values())
        square, count = group.total(torch.tensor([square, self.count], dtype=torch.float64)).tolist()
        return (square / count) ** 0.5 if count else 0.0


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
        process_group: the processes that each hold a part of every gradient (exact, without reuse); None for one.
        tally: counts over the selections so far.
    """

    kind: str = "exact"
    reuse_factor: float | None = None
    process_group: ProcessGroup | None = None
    tally: Tally = Tally()

    def best(self, gradients: Gradients, k: int, barred: Mapping[str, Tensor]) -> Indices:
        """Return the (about) k largest |g| outside ``barred`` (bits, True = not eligible)."""
        recalls: tuple[float, ...] = ()
        if self.kind == "exact":
            chosen = select_topk(gradients, k, barred, process_group=self.process_group)
        else:
            chosen = select_blocks(gradients, k, barred)
            recalls = (recall(chosen, select_topk(gradients, k, barred)),) if k else ()
        count = torch.tensor(sum(indices.numel() for indices in chosen.values()))
        self.tally += Tally(recalls, k - int(Group(self.process_group).total(count)))
        return chosen


class Claims:
    """The ``disjoint`` allocation: a unit takes the largest |g| among the unclaimed coordinates.

    Args:
        shards: of the parameters.
        protected: per shard, bits of its positions (True = never taken), uint8 ``[size / 8]``. Not changed.
        selection: selects, and adds to its tally.

    Between ``open_unit`` calls, ``take`` may be called once for all tensors or once per tensor.
    """

    #: the gradients of all units add up in ``parameter.grad`` and are selected from at the end
    pools = False

    def __init__(self, shards: Shards, protected: Sequence[Tensor], selection: Selection) -> None:
        self.shards, self.protected, self.selection = shards, protected, selection
        self._bits = [bits.clone() for bits in protected]
        self.taken = shards.bits(self._bits)
        self.units: list[KeptUnit] = []

    def open_unit(self) -> None:
        """Begin the next unit."""
        self.units.append(KeptUnit(self.shards))

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
        self._mark(chosen)
        self.units[-1].keep(gradients, chosen)
        return chosen

    def take_part(self, part: GradientPart, k: int) -> Indices:
        """Take ``k`` coordinates for the open unit from a gradient that is spread over processes; see ``take``.

        Exact, and without reuse. All processes take the same.
        """
        chosen, values = part.select(k, self.taken)
        self.selection.tally += Tally((), k - sum(indices.numel() for indices in chosen.values()))
        self._mark(chosen)
        self.units[-1].keep_values(chosen, values)
        return chosen

    def finish(self, gradients: Gradients) -> None:
        """Finish after the last unit, with the gradients left in ``parameter.grad``."""

    def _mark(self, chosen: Indices) -> None:
        for number, part in self.shards.parts(chosen):
            set_bits(self._bits[number], self.shards.layouts[number].join(part))

    def _with_reuse(self, gradients: Gradients, free: Indices, k: int, factor: float) -> Indices:
        """Let claimed coordinates displace free ones, smallest first, that are ``factor`` times smaller."""
        if len(self.units) == 1:
            return free
        claimed = [~bits | barred for bits, barred in zip(self._bits, self.protected, strict=True)]
        rivals = select_topk(gradients, k, self.shards.bits(claimed))
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

    def _mark(self, chosen: Indices) -> None:
        pass


class PooledClaims(Claims):
    """The ``pooled`` control: one selection, of all units' budgets together, from the sum of their gradients."""

    pools = True

    def __init__(self, shards: Shards, protected: Sequence[Tensor], selection: Selection) -> None:
        super().__init__(shards, protected, selection)
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

    def __init__(self, shards: Shards, protected: Sequence[Tensor], selection: Selection) -> None:
        super().__init__(shards, protected, selection)
        self.first: dict[str, Tensor] = {}
        self.before: Indices = {}

    def take(self, gradients: Gradients, k: int) -> Indices:
        chosen = self.selection.best(gradients, k, self.taken)
        self._mark(chosen)
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
