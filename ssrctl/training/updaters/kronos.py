"""KronosOpt in the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.bits import bits_to_indices
from ssrctl.core.budget import coordinates
from ssrctl.core.claims import KeptQuestion
from ssrctl.core.gradient_part import GradientPart, range_size
from ssrctl.core.kept_bytes import Numbering
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.layout import WORD, Layout
from ssrctl.core.mask import BlockMask
from ssrctl.core.units import Unit
from ssrctl.distributed.exchange import exchange_questions
from ssrctl.distributed.world import ALONE, World
from ssrctl.training.unit_gradients import UnitGradient
from ssrctl.training.updaters.base import (
    Changes,
    QuestionUpdate,
    frozen_coordinates,
    joined,
    load_state_tensors,
    names_with_gradient,
    state_tensors,
    sum_gradients,
    values_at,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KronosUpdater:
    """SSR algorithm 2: sequential, disjoint, exactly selected claims."""

    optimizer: KronosOpt

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        config: TrainConfig,
        protected: BlockMask | None = None,
        mask: BlockMask | None = None,
        world: World = ALONE,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.optimizer = KronosOpt(
            parameters,
            lr=config.resolved_learning_rate,
            protected=frozen_coordinates(protected, mask),
            update_rule=config.update_rule,
            betas=config.betas,
            eps=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            scope=config.scope,
            # the pooled control joins all steps into one unit: one backward pass, one selection
            allocation="disjoint" if config.allocation == "pooled" else config.allocation,
            selection=config.selection,
            reuse_factor=config.reuse_factor,
            budget=config.budget,
            max_step_budget=config.max_step_budget,
            master_weights=config.master_weights,
            process_group=process_group,
        )
        self.num_coordinates = self.optimizer.num_coordinates
        self.world = world
        self.pools = config.allocation == "pooled"
        self.num_protected = self.optimizer.num_protected
        self._granted = 0  # coordinates of the unit in progress
        self._part: GradientPart | None = None  # of its gradient, where processes share the question

    @staticmethod
    def bytes_per_parameter(config: TrainConfig, itemsize: int) -> float:
        """Estimate the memory besides the weights; ``benchmarks/optimizer_memory.py`` measures it.

        A gradient (with scope ``tensor`` of the largest tensor, taken as a quarter of the model); a bit each for
        protected (if any), taken, pending, touched; the kept sets of a question; sums and state of touched coordinates.
        """
        gradient = itemsize if config.scope == "global" else itemsize / 4
        return gradient + KronosUpdater.held_bytes(config, itemsize)

    @staticmethod
    def held_bytes(config: TrainConfig, itemsize: int, trained_frac: float = 1.0) -> float:
        """Return the bytes per parameter that stay during a backward pass: bits, kept sets, pending sums, state."""
        kept = config.budget * (2 + itemsize)
        touched = min(1.0, config.budget * config.questions_per_step)
        moments = 8 if config.update_rule == "adam" else 0
        pending = 8 if config.update_rule == "adam" else 4
        masters = 2 if config.master_weights and itemsize == 2 else 0
        bits = (3 if config.protect is None and config.mask is None else 4) / 8
        # the touched coordinates grow from step to step; half of the weights is a cautious guess
        return bits + trained_frac * (kept + touched * pending + 0.5 * (moments + masters))

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """Leave out the units without a signal, which claim nothing."""
        return joined(units) if self.pools else [unit for unit in units if unit.has_signal]

    def before_unit(self, unit: Unit) -> None:
        """Grant the unit its budget; scope ``tensor`` selects while the backward pass runs."""
        self._granted = coordinates(unit.budget, self.optimizer.num_unprotected)
        self.optimizer.begin_unit(self._granted)

    def add_question(self, gradients: Iterator[UnitGradient]) -> QuestionUpdate:
        update = QuestionUpdate()
        self.optimizer.begin_question()
        try:
            for made in gradients:
                part, self._part = self._part, None
                if part is None:
                    self.optimizer.claim()
                else:
                    self.optimizer.claim_part(part)
                update.granted.append(self._granted)
                update.gradients.append(made)
            if self.world.size == 1:
                update.kept = self.optimizer.end_question()
            else:  # ``exchange`` adds it, between those of the other processes
                closed = self.optimizer.close_question()
                update.kept, update.tally = closed.units, closed.tally
        except BaseException:
            self.optimizer.abandon_question()
            raise
        return update

    def combine(self, team: World, *, whole: bool) -> None:
        """Reduce-scatter the unit's gradient: each process selects in its range of the coordinates.

        Half the bytes of an all-reduce, and a part of the selection for each. Where the whole gradient is needed
        (``KronosOpt.claims_parts``) it is all-reduced, and all make the same claims.
        """
        named = {name: p for name, p in self.optimizer.named.items() if isinstance(p, torch.nn.Parameter)}
        if whole or not self.optimizer.claims_parts:
            sum_gradients(named, team)
            return
        layout = Layout({name: named[name] for name in names_with_gradient(named, team)}, align=WORD)
        size, first = range_size(layout, team.size), next(iter(named.values()))
        flat = torch.zeros(size * team.size, dtype=first.dtype, device=first.device)
        for name, offset in layout.offsets.items():
            gradient, named[name].grad = named[name].grad, None
            if gradient is not None:
                flat[offset : offset + gradient.numel()] = gradient.reshape(-1)
        self._part = GradientPart(team.scatter_sum(flat), layout, team.group)

    def exchange(self, mine: Mapping[int, QuestionUpdate]) -> None:
        """Add the questions of all processes, in the order in which one process would."""
        if self.world.size == 1:
            return
        numbering = Numbering(self.optimizer.shards, next(iter(self.optimizer.named.values())).dtype)
        kept = {number: KeptQuestion(update.kept, update.tally) for number, update in mine.items()}
        for question in exchange_questions(self.world, kept, numbering):
            self.optimizer.add_question(question)

    def pending(self) -> dict[str, Tensor]:
        return self.optimizer.pending

    def step(self) -> dict[str, float | None]:
        stats = self.optimizer.step()
        return {
            "grad_norm": stats.grad_norm,
            "clip_scale": stats.clip_scale,
            "updated_frac": stats.num_updated / self.num_coordinates,
            "lost_update_frac": stats.lost_frac,
            "missing_coordinates": stats.num_missing,
            "reused_coordinates": stats.num_reused,
            "selection_recall": stats.selection_recall,
        }

    def changes(self) -> Changes:
        named, touched = self.optimizer.named, self.optimizer.touched
        return values_at(named, {name: bits_to_indices(touched[name], p.numel()) for name, p in named.items()})

    def state(self) -> dict[str, Tensor]:
        return state_tensors(self.optimizer, list(self.optimizer.named))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        load_state_tensors(self.optimizer, list(self.optimizer.named), tensors)
