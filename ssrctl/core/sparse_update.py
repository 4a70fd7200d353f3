"""Moving the selected coordinates of one shard of parameters, with sparse state and exact master values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.bits import bit_patterns
from ssrctl.core.counting import Group
from ssrctl.core.layout import Layout
from ssrctl.core.masters import REMAINDER_DTYPES, join_master, split_master
from ssrctl.core.sparse_state import SparseState
from ssrctl.core.update_rules import Contribution, Hyper, UpdateRule

REMAINDER = "remainder"


@dataclass(frozen=True)
class Survival:
    """Counts of one step: updates that storage rounding would have lost, and stored weights that changed.

    Attributes:
        num_updated: selected coordinates.
        num_intended: those whose update is not zero.
        num_lost: intended ones that rounding to the weight's dtype would have swallowed without masters.
        num_changed: selected coordinates whose stored bits differ after the step.
    """

    num_updated: int = 0
    num_intended: int = 0
    num_lost: int = 0
    num_changed: int = 0

    @classmethod
    def of(cls, stored: Tensor, written: Tensor, before: Tensor, after: Tensor) -> Survival:
        """Count the updates of some coordinates, all ``[k]``.

        Args:
            stored: weights before the step, of their dtype.
            written: weights after it, of the same dtype.
            before: exact values before the step: masters, or ``stored`` as float32 or float64.
            after: exact values that the step computed.
        """
        intended = after != before
        lost = intended & ((stored.to(after.dtype) + (after - before)).to(stored.dtype) == stored)
        changed = bit_patterns(written) != bit_patterns(stored)
        return cls(stored.numel(), int(intended.sum()), int(lost.sum()), int(changed.sum()))

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.num_updated + other.num_updated,
            self.num_intended + other.num_intended,
            self.num_lost + other.num_lost,
            self.num_changed + other.num_changed,
        )

    def over(self, group: Group) -> Survival:
        """Return the sums over all processes of the group."""
        counts = torch.tensor([self.num_updated, self.num_intended, self.num_lost, self.num_changed])
        return Survival(*group.total(counts).tolist())

    @property
    def lost_frac(self) -> float:
        """Lost among intended, in [0, 1]; 0 when nothing was intended."""
        return self.num_lost / self.num_intended if self.num_intended else 0.0


def state_fields(rule: UpdateRule, dtype: torch.dtype, *, masters: bool) -> dict[str, torch.dtype]:
    """Return the fields kept per touched coordinate of a weight of ``dtype``: moments, and the master's remainder."""
    fields = dict.fromkeys(rule.moments, torch.float32)
    if masters and dtype in REMAINDER_DTYPES:
        fields[REMAINDER] = REMAINDER_DTYPES[dtype]
    return fields


def pending_fields(rule: UpdateRule) -> dict[str, torch.dtype]:
    """Return the fields summed per kept coordinate until they are applied."""
    return {"sum": torch.float32} | ({"squares": torch.float32} if rule.uses_squares else {})


def add_kept(pending: SparseState, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add kept gradients to the pending update, in the order of the units.

    Args:
        pending: with ``pending_fields``.
        parts: per unit (strictly ascending flat indices, int64 ``[k]``; float32 values ``[k]``), at least one.
    """
    indices, values = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    if len(parts) > 1:
        indices, order = indices.sort()
        if bool((indices[1:] == indices[:-1]).any()):  # shared coordinates: one unit after the other
            for part in parts:
                add_kept(pending, [part])
            return
        values = values.index_select(0, order)
    places, _ = pending.insert(indices)
    pending.fields["sum"].index_add_(0, places, values)  # indices are distinct, so each is added to once
    if "squares" in pending.fields:
        pending.fields["squares"].index_add_(0, places, values.square())


def apply_pending(
    weights: Mapping[str, Tensor],
    layout: Layout,
    pending: SparseState,
    state: SparseState,
    rule: UpdateRule,
    hyper: Hyper,
    *,
    lr: float,
    clip_scale: float,
) -> Survival:
    """``theta <- theta - lr * direction`` on the coordinates that wait; all others keep every bit.

    Args:
        weights: parameters of one dtype by name, contiguous, written in place.
        layout: of these parameters, in which ``pending`` and ``state`` count.
        pending: sums since the last step.
        state: state between steps, updated in place.
        rule: turns the kept gradient into a direction.
        hyper: the rule's settings.
        lr: step size.
        clip_scale: factor of the kept gradient.
    """
    indices = pending.indices()
    places, is_new = state.insert(indices)
    given = Contribution(
        _scaled(pending.fields["sum"], clip_scale), _scaled(pending.fields.get("squares"), clip_scale**2), is_new
    )
    old = {moment: state.fields[moment].index_select(0, places) for moment in rule.moments}
    direction, new = rule.direction(given, old, hyper)
    _put(state.fields, places, new)
    change = direction * lr
    chosen = {name: found for name, found in layout.split(indices).items() if found.numel()}
    stored = torch.cat([weights[name].view(-1).index_select(0, found) for name, found in chosen.items()])
    plain = (stored.float() - change).to(stored.dtype)
    intended = change != 0
    if REMAINDER in state.fields:
        master = join_master(stored, state.fields[REMAINDER].index_select(0, places)) - change
        written, remainder = split_master(master, stored.dtype)
        _put(state.fields, places, {REMAINDER: remainder})
    else:
        written = plain
    for (name, found), values in zip(chosen.items(), written.split([i.numel() for i in chosen.values()]), strict=True):
        weights[name].view(-1).index_copy_(0, found, values)
    lost, changed = intended & (plain == stored), bit_patterns(written) != bit_patterns(stored)
    return Survival(indices.numel(), int(intended.sum()), int(lost.sum()), int(changed.sum()))


def _scaled(values: Tensor | None, scale: float) -> Tensor:
    if values is None:
        return torch.empty(0)
    return values if scale == 1.0 else values * scale


def _put(fields: Mapping[str, Tensor], places: Tensor, values: Mapping[str, Tensor]) -> None:
    for name, column in values.items():
        fields[name].index_copy_(0, places, column)
