"""KronosOpt: each reasoning step updates its own, mostly disjoint set of coordinates (SSR algorithm 2).

For every question the claimed set starts as the protected set; each unit, in order, backpropagates its loss
and claims the coordinates with the largest gradients that are still unclaimed. The kept (index, value)
pairs of all units of all questions in the batch are applied at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssrctl.core.bits import bits_from_mask
from ssrctl.core.budget import coordinates, shared_budget
from ssrctl.core.claims import ALLOCATIONS, SELECTIONS, Indices, KeptPart, KeptQuestion, KeptUnit, Selection, Tally
from ssrctl.core.counting import Group
from ssrctl.core.gradient_part import GradientPart
from ssrctl.core.layout import Shards
from ssrctl.core.mask import BlockMask
from ssrctl.core.question import Question
from ssrctl.core.sparse_state import SparseState
from ssrctl.core.sparse_update import Survival, add_kept, apply_pending, pending_fields, state_fields
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.update_rules import RULES, Hyper, UpdateRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCOPES = ("global", "tensor")


@dataclass(frozen=True)
class StepStats:
    """Statistics of one ``KronosOpt.step``.

    Attributes:
        grad_norm: L2 norm of the kept gradient, summed over units and questions, before the clip (with the
            ``rms`` rule, after the units were divided by their RMS).
        clip_scale: factor of the clip, in (0, 1].
        num_updated: distinct coordinates that were updated.
        lost_frac: share of the intended nonzero updates that the storage dtype would have swallowed without
            master values, in [0, 1]; 0 when nothing was intended.
        num_missing: coordinates that units asked for and that were not free.
        num_reused: coordinates that a unit took although an earlier one of its question had claimed them.
        selection_recall: share of the exact sets that block selection found, mean over units; None with exact
            selection.
    """

    grad_norm: float
    clip_scale: float
    num_updated: int
    lost_frac: float = 0.0
    num_missing: int = 0
    num_reused: int = 0
    selection_recall: float | None = None


class KronosOpt(torch.optim.Optimizer):
    """Masked updates with sequential claims.

    Use::

        optimizer = KronosOpt(model.named_parameters(), lr=3e-2, protected=mask)
        for question in batch:
            optimizer.begin_question(len(units))   # or weights, or nothing and claim(k)
            for loss in units:                     # in step order
                loss.backward(retain_graph=True)
                optimizer.claim()                  # selects, keeps, and drops the dense gradient
        optimizer.step()

    With an ordinary loop, ``loss.backward(); optimizer.step()``, the whole batch is one question of one unit.

    Memory in addition to the parameters and the current gradient grows with the number of selected coordinates: a
    bit per coordinate each for protected, taken, pending and touched, 2 bytes and a gradient value per kept
    coordinate, and per touched coordinate 2 bytes for the master value of a bfloat16 weight (4 for a
    float16 one) and 8 for the moments of ``adam``.

    Args:
        params: (name, parameter) pairs, as from ``model.named_parameters()``, or groups of such; a tied
            parameter once. Groups may set ``lr``, ``betas`` and ``eps``.
        lr: step size; it does not carry over between update rules.
        protected: coordinates that are never claimed and so never change; names and shapes must be those of
            ``params``.
        update_rule: ``sgd``, the gradient itself; ``adam``, moments for touched coordinates only; ``rms``,
            each unit's kept gradient divided by its root mean square.
        betas, eps: of ``adam`` (``eps`` also of ``rms``); see ``core.update_rules``.
        max_grad_norm: clip on the L2 norm of the kept (sparse) gradient of the whole batch; 0 is off. The
            ``rms`` rule is not clipped.
        scope: ``global``, one threshold over all parameters; ``tensor``, the same share of each, selected while
            the backward pass runs, so that each dense gradient is freed at once. Then each unit must be one
            backward pass.
        allocation: ``disjoint`` is the paper's; see ``core.claims`` for ``overlap``, ``pooled``, ``shuffled``.
        selection: ``exact``, or ``block`` for the paper's approximation, whose recall is then measured.
        reuse_factor: a unit may take a claimed (never a protected) coordinate whose |gradient| is at least so
            many times that of the free coordinate it displaces; None forbids it.
        budget: share B of the unprotected coordinates that one question may claim (``begin_question``).
        max_step_budget: largest share k_max that one unit may claim.
        master_weights: keep the exact float32 value of touched bfloat16 and float16 coordinates.
        process_group: every process of the group holds its rows of each parameter, those of a lower rank before those of
            a higher (the local tensors of ``fully_shard``; a part may be empty), gives their gradients, and makes the same
            calls. Units then claim the same coordinates, and coordinates change by the same values, as in one process
            that holds whole parameters; sets, state and ``protected`` are those of the process's own rows. Needs
            ``selection="exact"`` and no ``reuse_factor``.

    Attributes:
        survival: counts of the last step, over all processes of the group.

    Raises:
        ValueError: parameters without names or with equal ones, that are not contiguous, a protected mask over
            other tensors, or a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float,
        *,
        protected: BlockMask | None = None,
        update_rule: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
        scope: str = "global",
        allocation: str = "disjoint",
        selection: str = "exact",
        reuse_factor: float | None = None,
        budget: float = 0.05,
        max_step_budget: float = 0.01,
        master_weights: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        _check_choice("update_rule", update_rule, RULES)
        _check_choice("scope", scope, SCOPES)
        _check_choice("allocation", allocation, ALLOCATIONS)
        _check_choice("selection", selection, SELECTIONS)
        _check_range("the learning rate", lr, 0.0 <= lr < math.inf, "at least 0")
        _check_range("betas", betas, all(0.0 <= beta < 1.0 for beta in betas), "in [0, 1)")
        _check_range("eps", eps, 0.0 < eps < math.inf, "above 0")
        _check_range("max_grad_norm", max_grad_norm, max_grad_norm >= 0, "at least 0")
        _check_range("budget", budget, 0 < budget <= 1, "in (0, 1]")
        _check_range("max_step_budget", max_step_budget, 0 < max_step_budget <= 1, "in (0, 1]")
        _check_range("reuse_factor", reuse_factor, reuse_factor is None or reuse_factor >= 1, "None or at least 1")
        if scope == "tensor" and allocation in ("pooled", "shuffled"):
            raise ValueError(f"allocation {allocation!r} needs whole gradients, which scope 'tensor' drops at once")
        if reuse_factor is not None and allocation != "disjoint":
            raise ValueError(f"reuse_factor loosens the disjoint allocation; it has no meaning for {allocation!r}")
        if process_group is not None and (selection != "exact" or reuse_factor is not None):
            raise ValueError("several processes that share each parameter need exact selection and no reuse_factor")
        self.named: dict[str, Tensor] = {}
        self._group = Group(process_group)
        self.survival = Survival()
        self.num_protected = 0
        self._shards = Shards({})
        self._groups: list[int] = []  # by shard, the number of its parameter group
        self._protected: list[Tensor] = []  # bits of each shard's positions
        self._protected_counts: dict[str, int] = {}
        self._states: dict[int, SparseState] = {}  # by shard, like the pending sums
        self._question: Question | None = None
        self._pending: dict[int, SparseState] = {}
        self._pending_names: dict[str, None] = {}  # in the order in which they were first kept
        self._tally = Tally()
        self.selection, self.reuse_factor = selection, reuse_factor
        self.update_rule, self.max_grad_norm = update_rule, max_grad_norm
        self.scope, self.allocation = scope, allocation
        self.budget, self.max_step_budget, self.master_weights = budget, max_step_budget, master_weights
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})
        if protected is not None:
            self._protect(protected)

    @property
    def rule(self) -> UpdateRule:
        """The rule that ``update_rule`` names."""
        return RULES[self.update_rule]

    @property
    def shards(self) -> Shards:
        """The numbering of all coordinates, in which kept sets are stored."""
        return self._shards

    @property
    def num_coordinates(self) -> int:
        """Coordinates of all parameters, over all processes."""
        return int(self._group.total(torch.tensor(sum(parameter.numel() for parameter in self.named.values()))))

    @property
    def num_unprotected(self) -> int:
        """Coordinates that units may claim; budgets are fractions of this. Frozen parameters have none.

        The processes of a group count together, so that all must ask.
        """
        return sum(self._free().values())

    @property
    def touched(self) -> dict[str, Tensor]:
        """Bits (as in ``core.bits``) of every coordinate that was ever updated, by parameter name."""
        return self._shards.bits([self._state_of(number).bits for number in range(len(self._shards.layouts))])

    @property
    def pending(self) -> dict[str, Tensor]:
        """Ascending flat indices (int64) of the coordinates that ``step`` will update, by parameter name."""
        found: dict[str, Tensor] = {}
        for number, pending in self._pending.items():
            found |= self._shards.layouts[number].split(pending.indices())
        return found

    def begin_question(self, units: int | Sequence[float] | None = None) -> None:
        """Forget the claims of the question before; what it kept stays for ``step``.

        Args:
            units: number of units to come, which share ``budget`` equally; or their weights w_i, by which it is
                dealt out: at most k_max each, and what the cap cuts off goes to the others
                (``core.budget.shared_budget``). With None, k is given to ``claim``.

        Raises:
            RuntimeError: a gradient is there already, which the first unit's would be added to.
            ValueError: a negative number of units, or weights that cannot be shared out by.
        """
        self.end_question()
        if left := [name for name, parameter in self.named.items() if parameter.grad is not None]:
            raise RuntimeError(f"begin_question() with {len(left)} gradients left, first {left[0]}: zero_grad() first")
        if isinstance(units, int) and units < 0:
            raise ValueError(f"a question has at least 0 units, got {units}")
        weights = [1.0] * units if isinstance(units, int) else list(() if units is None else units)
        shares = shared_budget(weights, budget=self.budget, max_step_budget=self.max_step_budget)
        total = self.num_unprotected
        self._question = self._new_question([coordinates(share, total) for share in shares])

    def begin_unit(self, k: int | None = None) -> None:
        """Say before a unit's backward pass how many coordinates it may claim.

        Scope ``tensor`` needs to know this beforehand; after ``begin_question`` with units or weights it does.

        Args:
            k: number of coordinates, at least 0; None takes the next of the question's planned budgets.

        Raises:
            RuntimeError: no question was begun, the unit before was not claimed, or no budget is planned.
            ValueError: negative k.
        """
        if self._question is None:
            raise RuntimeError("begin_unit() before begin_question()")
        self._question.begin_unit(k)

    @torch.no_grad()
    def claim(self, k: int | None = None) -> Indices:
        """Claim the unit's k largest |gradient| coordinates that are free, keep their values, drop the gradients.

        Args:
            k: number of coordinates; None takes the k given to ``begin_unit``, or the next of the planned budgets. When
                fewer are free, all of these are claimed.

        Returns:
            Ascending flat indices per parameter name, int64; empty with allocation ``pooled``, which selects
            at the end of the question.

        Raises:
            RuntimeError: no question was begun, no parameter has a gradient, or k comes too late (scope
                ``tensor`` selects during the backward pass).
            NonFiniteGradient: NaN or infinity in an eligible coordinate, k above 0; nothing is claimed then.
        """
        if self._question is None:
            raise RuntimeError("claim() before begin_question()")
        gradients = self._gradients()
        if self.scope == "tensor":
            if self._group.group is not None:  # the gradients of shards are set without autograd, which calls the hooks
                for name in gradients:
                    self._on_gradient(name)
            return self._question.end_unit(k, gradient_left=bool(gradients))
        if not gradients:
            raise RuntimeError("claim() found no gradient: call backward() first")
        chosen = self._question.take(gradients, k)
        if not self._question.claims.pools:
            self.zero_grad(set_to_none=True)
        return chosen

    @torch.no_grad()
    def claim_part(self, part: GradientPart) -> Indices:
        """Claim the unit's k as ``claim`` does, from a gradient that is spread over processes, which all call this.

        Needs scope ``global``, exact selection without reuse, and allocation ``disjoint`` or ``overlap``.

        Raises:
            RuntimeError: no question was begun.
            NonFiniteGradient: in all processes, as in ``claim``.
            ValueError: settings that need the whole gradient.
        """
        if self._question is None:
            raise RuntimeError("claim_part() before begin_question()")
        if not self.claims_parts:
            raise ValueError("these settings of scope, allocation, selection or reuse_factor need the whole gradient")
        return self._question.take(part, None)

    @property
    def claims_parts(self) -> bool:
        """True if ``claim_part`` suits the settings, and all parameters have one dtype."""
        whole = self.scope == "tensor" or self.allocation in ("pooled", "shuffled")
        whole |= self.selection != "exact" or self.reuse_factor is not None
        return not whole and len({parameter.dtype for parameter in self.named.values()}) == 1

    def end_question(self) -> list[KeptUnit]:
        """Close the open question, if there is one; ``begin_question`` and ``step`` do it by themselves.

        Returns:
            What each unit keeps, in order (``pooled``: one for the whole question).

        Raises:
            RuntimeError: a unit was begun, or its gradient computed, but not claimed.
        """
        if self._question is None:
            return []
        kept = self.close_question()
        self.add_question(kept)
        return kept.units

    @torch.no_grad()
    def close_question(self) -> KeptQuestion:
        """Close the open question without adding what it keeps to the update; ``add_question`` does, in any process.

        Raises:
            RuntimeError: no question is open, or a unit was begun, or its gradient computed, but not claimed.
        """
        if self._question is None:
            raise RuntimeError("close_question() before begin_question()")
        units = self._question.finish(self._gradients())
        if self._question.claims.pools:
            self.zero_grad(set_to_none=True)
        tally = self._question.claims.selection.tally
        self._question = None
        return KeptQuestion(units, tally)

    @torch.no_grad()
    def add_question(self, kept: KeptQuestion) -> None:
        """Add a closed question to the update that ``step`` applies; sums depend on the order of the questions."""
        self._tally += kept.tally
        self._add(kept.units)

    def abandon_question(self) -> None:
        """Drop what the open question has claimed, as when one of its gradients is NaN."""
        self._question = None
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> StepStats:  # type: ignore[override]
        """Apply everything that was claimed since the last step, at once.

        Gradients that are there without any question having been begun are claimed as one unit first.

        Raises:
            RuntimeError: an open question has an unclaimed gradient.
            NonFiniteGradient: a gradient, or the sum of what was kept, is NaN or infinite; nothing is applied.
        """
        if closure is not None:
            raise ValueError("KronosOpt takes no closure: gradients are claimed unit by unit")
        if self._question is None and (gradients := self._gradients()):
            self._claim_all(gradients)
        self.end_question()
        norm = self._pending_norm()
        clips = self.rule.clips and self.max_grad_norm and norm > 0
        scale = min(1.0, self.max_grad_norm / norm) if clips else 1.0
        moved = Survival()
        for number in sorted(self._pending):
            group, layout = self._group_of(number), self._shards.layouts[number]
            moved += apply_pending(
                {name: self.named[name] for name in layout.numels},
                layout,
                self._pending.pop(number),
                self._state_of(number),
                self.rule,
                Hyper(tuple(group["betas"]), group["eps"]),
                lr=float(group["lr"]),
                clip_scale=scale,
            )
        self._pending_names.clear()
        self.survival = moved = moved.over(self._group)
        done, self._tally = self._tally, Tally()
        return StepStats(
            grad_norm=norm,
            clip_scale=scale,
            num_updated=moved.num_updated,
            lost_frac=moved.lost_frac,
            num_missing=done.num_missing,
            num_reused=done.num_reused,
            selection_recall=done.recall,
        )

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}

    def _free(self) -> dict[str, int]:
        """By parameter name, how many coordinates may be claimed, over all processes."""
        counts = [
            parameter.numel() - self._protected_counts.get(name, 0) if parameter.requires_grad else 0
            for name, parameter in self.named.items()
        ]
        return dict(zip(self.named, self._group.total(torch.tensor(counts, dtype=torch.int64)).tolist(), strict=True))

    def _new_question(self, planned: Sequence[int]) -> Question:
        """Nothing claimed yet; the model may have moved to another device since the optimizer was built."""
        self._protected = [bits.to(self._device_of(number)) for number, bits in enumerate(self._protected)]
        claims = ALLOCATIONS[self.allocation](
            self._shards, self._protected, Selection(self.selection, self.reuse_factor, self._group.group)
        )
        return Question(claims, self._free(), planned)

    def _claim_all(self, gradients: Mapping[str, Tensor]) -> None:
        """Claim the current gradients as one unit with the budget of one, as in an ordinary training loop."""
        signals = sum(bool(gradient.any()) for gradient in gradients.values())
        if not int(self._group.total(torch.tensor(signals))):
            self.zero_grad(set_to_none=True)  # no signal claims nothing
            return
        k = coordinates(min(self.max_step_budget, self.budget), self.num_unprotected)
        question = self._new_question([k])
        if self.scope == "tensor":
            for name, gradient in gradients.items():
                question.take_one(name, gradient)
            question.end_unit()
        else:
            question.take(gradients, None)
        if not question.claims.pools:
            self.zero_grad(set_to_none=True)
        self._question = question

    def _pending_norm(self) -> float:
        """Return the L2 norm (float64) of the pending update; drop the update and raise if it is not finite."""
        sums: dict[str, Tensor] = {}
        for number, pending in self._pending.items():
            found = self._shards.layouts[number].split(pending.indices())
            counts = [indices.numel() for indices in found.values()]
            sums |= dict(zip(found, pending.fields["sum"].split(counts), strict=True))
        square, broken = 0.0, None
        # Added up by parameter, in the order in which they came: the norm depends on it in its last bit.
        for name in self._pending_names:
            part = float(sums[name].double().square().sum())
            if broken is None and not math.isfinite(part):
                broken = (name, int((~sums[name].isfinite()).sum()))
            square += part
        if (first := self._group.first(broken)) is not None:
            self._pending.clear()
            self._pending_names.clear()
            raise NonFiniteGradient(*first)
        square = float(self._group.total(torch.tensor(square, dtype=torch.float64)))
        norm: float = square**0.5
        return norm

    def _add(self, units: Sequence[KeptUnit]) -> None:
        """Add the units' kept gradients to the pending update, in float32, in the order of the units."""
        kept = {name for unit in units for part in unit.parts for name in part.counts}
        self._pending_names |= dict.fromkeys(name for name in self.named if name in kept)
        scale_of = self.rule.unit_scale
        rms = [unit.rms(self._group) if scale_of else 0.0 for unit in units]
        shards: dict[int, list[tuple[float, KeptPart]]] = {}
        for place, unit in enumerate(units):
            for part in unit.parts:
                scale = scale_of(rms[place], self._group_of(part.shard)["eps"]) if scale_of else 1.0
                shards.setdefault(part.shard, []).append((scale, part))
        for number, parts in shards.items():
            if number not in self._pending:
                size, device = self._shards.layouts[number].size, self._device_of(number)
                self._pending[number] = SparseState(size, pending_fields(self.rule), device)
            add_kept(
                self._pending[number],
                [(part.chosen.to_indices(), part.values.float() * scale) for scale, part in parts],
            )

    # scope "tensor"

    def _on_gradient(self, name: str) -> None:
        """Select from a parameter's gradient as soon as autograd has completed it."""
        if self._question is None or not self._question.knows_next_budget:
            return
        parameter = self.named[name]
        if parameter.grad is None:
            raise RuntimeError(f"the gradient of {name} is gone: has another optimizer a question open on this model?")
        with torch.no_grad():
            self._question.take_one(name, parameter.grad)
        parameter.grad = None

    # parameters, protection, state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but parameters need names (claims, masks and deltas are by name). Later groups are unprotected.

        Raises:
            ValueError: no names, a name that is taken, or a parameter that is not contiguous.
            RuntimeError: in the middle of a question.
        """
        if self._question is not None:
            raise RuntimeError("add_param_group() in the middle of a question: step() first")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            added = self._checked_names(group)
        except ValueError:
            self.param_groups.pop()
            raise
        before = len(self._shards.layouts)
        self._shards.add(added)
        self._groups += [len(self.param_groups) - 1] * (len(self._shards.layouts) - before)
        for layout in self._shards.layouts[before:]:
            device = added[next(iter(layout.numels))].device
            self._protected.append(torch.zeros(1, dtype=torch.uint8, device=device).expand(layout.size // 8))
        for name, parameter in added.items():
            self.named[name] = parameter
            if self.scope == "tensor" and parameter.requires_grad:
                _hook(parameter, name, weakref.ref(self))

    def _checked_names(self, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if group["params"] and "param_names" not in group:
            raise ValueError("KronosOpt needs (name, parameter) pairs, as from model.named_parameters()")
        if len(group["params"]) != len(set(group["params"])):
            raise ValueError("a parameter came under two names: give tied parameters once")
        added: dict[str, Tensor] = {}
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=True):
            if name in self.named or name in added:
                raise ValueError(f"two parameters have the same name: {name}")
            if not parameter.is_contiguous():
                raise ValueError(f"{name} of shape {tuple(parameter.shape)} is not contiguous in memory")
            added[name] = parameter
        group.setdefault("param_names", [])  # type: ignore[attr-defined]
        return added

    def _protect(self, protected: BlockMask) -> None:
        shapes = {name: tuple(p.shape) for name, p in self.named.items()}
        if protected.shapes != shapes:
            odd = sorted(n for n in shapes.keys() | protected.shapes.keys() if shapes.get(n) != protected.shapes.get(n))
            raise ValueError(f"the protected mask is over other tensors; first difference: {odd[0]}")
        self._protected_counts = {name: tiles.count() for name, tiles in protected.tensors.items()}
        self.num_protected = int(self._group.total(torch.tensor(sum(self._protected_counts.values()))))
        for number, layout in enumerate(self._shards.layouts):
            if any(self._protected_counts[name] for name in layout.numels):
                self._protected[number] = self._protected[number].contiguous()  # other shards hold one zero
        views = self._shards.bits(self._protected)
        for name, bits in bits_from_mask(protected).items():
            if self._protected_counts[name]:
                views[name].copy_(bits)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch: per parameter ``bits`` (see ``touched``), moments and master remainders.

        Raises:
            RuntimeError: claims are pending until ``step``; they are not part of the state.
        """
        if self._question is not None or self._pending:
            raise RuntimeError("state_dict() with claims that wait to be applied: step() first")
        for number, state in self._states.items():
            for name, tensors in state.tensors_of(self._shards.layouts[number]).items():
                self.state[self.named[name]] = tensors
        return super().state_dict() | {"update_rule": self.update_rule}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; every dtype and bit is kept, and a refused state changes nothing.

        Raises:
            ValueError: groups or state of other parameters, or of another update rule.
            RuntimeError: claims wait for ``step``.
        """
        if self._question is not None or self._pending:
            raise RuntimeError("load_state_dict() with claims that wait to be applied: step() first")
        if (rule := state_dict.get("update_rule", self.update_rule)) != self.update_rule:
            raise ValueError(f"the state is of the update rule {rule!r}, this optimizer's is {self.update_rule!r}")
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        names = [name for group in self.param_groups for name in group["param_names"]]
        saved = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
        if odd := [f"{theirs}, here {ours}" for theirs, ours in zip(saved, names, strict=False) if theirs != ours]:
            raise ValueError(f"the state is of other parameters; first difference: {odd[0]}")
        restored = {
            name: self._restored(name, state_dict["state"][number])
            for number, name in zip(numbers, names, strict=False)
            if number in state_dict["state"]
        }
        # Checks and takes over the groups; the state that it would cast to the weights' dtypes is kept from it.
        super().load_state_dict(state_dict | {"state": {}})
        self._states = {}
        for number, layout in enumerate(self._shards.layouts):
            if parts := {name: restored[name] for name in layout.numels if name in restored}:
                self._states[number] = SparseState.joined(layout, parts)

    def _state_of(self, number: int) -> SparseState:
        """Return a shard's state; one that was never touched gets its own now."""
        if number not in self._states:
            layout = self._shards.layouts[number]
            fields = self._fields_of(self.named[next(iter(layout.numels))])
            self._states[number] = SparseState(layout.size, fields, self._device_of(number))
        return self._states[number]

    def _group_of(self, number: int) -> dict[str, Any]:
        return self.param_groups[self._groups[number]]

    def _device_of(self, number: int) -> torch.device:
        return self.named[next(iter(self._shards.layouts[number].numels))].device

    def _fields_of(self, parameter: Tensor) -> dict[str, torch.dtype]:
        return state_fields(self.rule, parameter.dtype, masters=self.master_weights)

    def _restored(self, name: str, stored: Mapping[str, Tensor]) -> SparseState:
        """Return a parameter's state from a checkpoint, checked against what this optimizer keeps."""
        parameter = self.named[name]
        fields = self._fields_of(parameter)
        found = {key: tensor.dtype for key, tensor in stored.items() if key != "bits"}
        if found != fields:
            raise ValueError(
                f"the state of {name} holds {found}, this optimizer keeps {fields}: "
                "update_rule, master_weights and the weights' dtype must be those of the run that saved it"
            )
        return SparseState.from_tensors(
            parameter.numel(), {key: tensor.to(parameter.device) for key, tensor in stored.items()}
        )

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and pickle; as in torch, hooks and a scheduler's wrapper of ``step`` stay behind."""
        return {key: value for key, value in vars(self).items() if key != "step" and not key.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # torch's load_state_dict also calls this, with groups and state only
        if "named" in state and self.scope == "tensor":
            for name, parameter in self.named.items():
                if parameter.requires_grad:
                    _hook(parameter, name, weakref.ref(self))


def _hook(parameter: Tensor, name: str, optimizer: weakref.ref[KronosOpt]) -> None:
    """Select as soon as the gradient is complete, for as long as the optimizer lives."""

    def on_gradient(_: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive._on_gradient(name)

    parameter.register_post_accumulate_grad_hook(on_gradient)


def _check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {setting} {value!r}; known: {', '.join(known)}")


def _check_range(setting: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{setting} must be {wanted}, got {value}")
