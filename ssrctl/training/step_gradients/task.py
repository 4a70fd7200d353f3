"""The task that the gradient methods share: a question, its units, and one unit's backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.losses import step_policy_loss
from ssrctl.core.units import AdvantageColumn, Unit
from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.head import LOGIT_CHUNK_TOKENS, HeadSettings


@dataclass(frozen=True)
class Dials:
    """The choices of recomputed gradients; see ``chunked.recomputed_gradients``.

    Attributes:
        units_at_once: units that share a recomputed forward pass, whose gradients exist together; None for one.
        chunk_tokens: most tokens of a chunk; None for ``chunked.default_chunk_tokens``.
    """

    units_at_once: int | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class UnitGradient:
    """One unit's loss, after its backward pass has filled ``parameter.grad``.

    Attributes:
        unit: the unit.
        loss: its value (before ``loss_scale``).
        num_terms: surrogate terms in it.
        num_clipped: those in which the clip was active.
    """

    unit: Unit
    loss: float
    num_terms: int
    num_clipped: int


class NonFiniteLoss(ValueError):
    """A unit's loss is NaN or infinite."""


def scored_tokens(step_ids: Tensor, step: int, advantages: AdvantageColumn) -> Tensor:
    """Return the tokens (bool ``[G, R]``) of a step in the responses whose advantage is known and finite."""
    scored = torch.tensor([a is not None and math.isfinite(a) for a in advantages], device=step_ids.device)
    return (step_ids == step) & scored.unsqueeze(1)


@dataclass(frozen=True)
class ActiveUnit:
    """A unit whose loss has at least one term.

    Attributes:
        unit: the unit.
        inside: bool ``[G, R]``, True at the tokens that its loss is made of.
        rows: indices of the responses that have such tokens.
        start, end: the first such token over all responses, and one past the last.
    """

    unit: Unit
    inside: Tensor
    rows: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GradientTask:
    """One question to differentiate, with the settings of its loss; see ``training.unit_gradients.unit_gradients``."""

    model: Any
    batch: GroupBatch
    units: Sequence[Unit]
    temperature: float = 1.0
    clip_epsilon: float = 0.2
    level: str = "sequence"
    loss_scale: float = 1.0
    micro_batch_tokens: int | None = None
    logit_chunk_tokens: int = LOGIT_CHUNK_TOKENS
    dials: Dials | None = None
    on_logprobs: Callable[[Tensor], None] | None = None
    on_entropy: Callable[[Tensor], None] | None = None
    on_unit: Callable[[Unit], None] | None = None
    epsilon_high: float | None = None
    token_weights: Tensor | None = None
    beta: float = 0.0
    num_responses: Mapping[int, int] | None = None

    @cached_property
    def active(self) -> list[ActiveUnit]:
        """The units that have a loss, in order."""
        return list(self._active())

    @property
    def needs_all_logprobs(self) -> bool:
        """True if values (without a graph) are needed even for tokens outside all units."""
        return self.on_logprobs is not None or self.on_entropy is not None or self.level == "sequence"

    @property
    def settled_dials(self) -> Dials:
        """The dials in force."""
        return self.dials or Dials()

    @property
    def head(self) -> HeadSettings:
        """The settings of the log-probabilities."""
        return HeadSettings(self.temperature, self.logit_chunk_tokens, self.on_entropy is not None)

    def report(self, logprobs: Tensor, entropy: Tensor | None) -> None:
        """Give the detached log-probabilities and entropies ``[G, R]`` of a pass to those who asked."""
        if self.on_logprobs is not None:
            self.on_logprobs(logprobs.detach())
        if self.on_entropy is not None and entropy is not None:
            self.on_entropy(entropy.detach())

    def announce(self, unit: Unit) -> None:
        """Tell that the gradient of a unit follows."""
        if self.on_unit is not None:
            self.on_unit(unit)

    def _active(self) -> Iterator[ActiveUnit]:
        steps = self.batch.step_ids
        for unit in self.units:
            inside = torch.zeros_like(steps, dtype=torch.bool)
            for step, column in zip(unit.steps, unit.advantages, strict=True):
                inside |= scored_tokens(steps, step, column)
            columns = inside.any(0).nonzero().flatten().tolist()
            if columns:
                rows = inside.any(1).nonzero().flatten().tolist()
                yield ActiveUnit(unit, inside, tuple(rows), columns[0], columns[-1] + 1)

    def differentiate(self, unit: Unit, values: Tensor) -> tuple[UnitGradient, Tensor]:
        """Compute the unit's loss and its derivative by the log-probabilities.

        Args:
            unit: an active one.
            values: ``[G, R]``, the log-probabilities; no graph is used.

        Returns:
            The loss, and d(loss_scale * loss)/d(log-probability) ``[G, R]``, 0 outside the unit's tokens.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        logprobs = values.detach().requires_grad_()
        losses, terms, clipped = [], 0, 0
        for step, column in zip(unit.steps, unit.advantages, strict=True):
            advantages = [float("nan") if a is None else a for a in column]
            made = step_policy_loss(
                logprobs,
                self.batch.old_logprobs,
                self.batch.step_ids,
                step,
                torch.tensor(advantages, dtype=torch.float64, device=logprobs.device),
                clip_epsilon=self.clip_epsilon,
                level=self.level,
                epsilon_high=self.epsilon_high,
                token_weights=self.token_weights,
                beta=self.beta,
                reference=self.batch.reference,
                num_responses=None if self.num_responses is None else self.num_responses[step],
                correction=None if self.batch.correction is None else self.batch.correction.weights,
            )
            if made.loss is not None:
                losses.append(made.loss)
            terms, clipped = terms + made.num_terms, clipped + made.num_clipped
        loss = torch.stack(losses).sum()
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise NonFiniteLoss(f"the loss of steps {list(unit.steps)} is {value}")
        (derivative,) = torch.autograd.grad(loss * self.loss_scale, logprobs)
        return UnitGradient(unit, value, terms, clipped), derivative
