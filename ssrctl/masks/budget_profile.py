"""The gradient that later steps still find when earlier ones have claimed their coordinates (SSR section 2.3.3)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.bits import set_bits, unpack_bits
from ssrctl.core.topk import CHUNK, NonFiniteGradient, select_topk
from ssrctl.core.units import Unit, plan_units
from ssrctl.errors import UserError
from ssrctl.io.budget_file import MassCurve, ShareCurve
from ssrctl.io.records import Rollout
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import step_of_tokens, token_starts
from ssrctl.sampling.endings import end_token_ids
from ssrctl.text.prompts import encode_prompt
from ssrctl.training.unit_gradients import GroupBatch, NonFiniteLoss, make_batch, response_logprobs, unit_gradients


@dataclass(frozen=True)
class StepMass:
    """The gradient that one step of one problem found.

    Attributes:
        step: its index, from 0.
        mass: sum of |g| over the coordinates it claimed: the largest ones that were neither protected nor
            claimed by an earlier step of the problem.
        energy_available: sum of g^2 over all such coordinates, over the sum of g^2 over all coordinates.
        energy_claimed: sum of g^2 over the coordinates it claimed, over the same.
        share: sum of g^2 over the coordinates that were neither protected nor claimed, over the sum of g^2 over
            all unprotected ones; None where that sum is 0.
    """

    step: int
    mass: float
    energy_available: float
    energy_claimed: float
    share: float | None


def signal_units(advantages: Sequence[Sequence[float | None]], max_steps: int) -> list[Unit]:
    """Return one unit per step that has an advantage other than 0 in any response, up to step ``max_steps``.

    Args:
        advantages: one list per response, one value per step, None where the score is missing.
        max_steps: steps beyond this many are left out.
    """
    longest = max((len(row) for row in advantages), default=0)
    return [unit for unit in plan_units(advantages, [0.0] * longest)[:max_steps] if unit.has_signal]


def claim_masses(
    gradients: Iterator[tuple[int, Mapping[str, Tensor]]], claim: int, protected: Mapping[str, Tensor]
) -> Iterator[StepMass]:
    """Let each step claim, in order, and measure its mass.

    Args:
        gradients: (step, gradient by tensor name) in step order; a gradient is read before the next is asked
            for, so it may live in one place.
        claim: coordinates that each step claims.
        protected: bits per tensor name (``core.bits``), set = never claimed; every tensor has them. They are
            copied, not changed.

    Raises:
        NonFiniteGradient: NaN or infinity in a gradient.
    """
    taken = {name: bits.clone() for name, bits in protected.items()}
    for step, gradient in gradients:
        whole = unprotected = available = 0.0
        for name, values in gradient.items():
            flat = values.reshape(-1)
            for start in range(0, flat.numel(), CHUNK):
                square = flat[start : start + CHUNK].float().square()
                end = start + square.numel()
                # float64: over 1e8 coordinates a float32 sum is off by whole percents.
                whole += float(square.double().sum())
                unprotected += float((square * ~unpack_bits(protected[name], start, end)).double().sum())
                available += float((square * ~unpack_bits(taken[name], start, end)).double().sum())
        mass = claimed = 0.0
        for name, indices in select_topk(gradient, claim, taken).items():
            chosen = gradient[name].reshape(-1)[indices].double()
            mass += float(chosen.abs().sum())
            claimed += float(chosen.float().square().double().sum())
            set_bits(taken[name], indices)
        if whole > 0:
            share = available / unprotected if unprotected > 0 else None
            yield StepMass(step, mass, available / whole, claimed / whole, share)


def problem_masses(
    model: Any,
    batch: GroupBatch,
    advantages: Sequence[Sequence[float | None]],
    *,
    claim: int,
    protected: Mapping[str, Tensor],
    max_steps: int,
    temperature: float,
) -> list[StepMass]:
    """Return the masses of one problem's steps: exact gradients of the steps' policy losses, claims in step order.

    A step without signal (all its advantages 0 or missing) has no gradient: it is left out, and claims nothing.

    Args:
        model: a causal LM; its gradients are None afterwards.
        batch: the responses to the problem.
        advantages: one list per response, one value per step.
        claim: coordinates that each step claims.
        protected: bits of every parameter by name.
        max_steps: profile no further.
        temperature: of the sampling.

    Raises:
        UserError: a loss or gradient that is NaN or infinite.
    """
    parameters = dict(model.named_parameters())

    def gradients() -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        units = signal_units(advantages, max_steps)
        for made in unit_gradients(model, batch, units, temperature=temperature):
            yield made.unit.steps[0], {n: p.grad for n, p in parameters.items() if p.grad is not None}
            model.zero_grad(set_to_none=True)

    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            return list(claim_masses(gradients(), claim, protected))
    except (NonFiniteLoss, NonFiniteGradient) as error:
        raise UserError(f"a step's gradient cannot be used: {error}", "use --dtype float32") from error
    finally:
        model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class MeanCurves:
    """Both profiles by step index, and the mean shares of the gradient's energy.

    Attributes:
        share: of rule ``share``.
        mass: of rule ``paper``.
        energy_available, energy_claimed: means of the attributes of ``StepMass``, one value per value of ``mass``.
    """

    share: ShareCurve
    mass: MassCurve
    energy_available: list[float]
    energy_claimed: list[float]


def mean_curves(problems: Sequence[Sequence[StepMass]]) -> MeanCurves:
    """Average over problems (SSR section 2.3.3).

    A step that a problem lacks, or that had no signal there, does not count as 0. Shares are averaged as they are:
    each lies in [0, 1]. Masses are averaged first and then divided by that of step 1: a ratio per problem would be
    ruled by problems whose first step is nearly silent. A curve ends before the first index that no problem has.

    Args:
        problems: each problem's masses, in step order.

    Raises:
        ValueError: no problem has a mass above 0 at step index 0.
    """
    by_step: dict[int, list[StepMass]] = {}
    for found in (found for steps in problems for found in steps):
        by_step.setdefault(found.step, []).append(found)
    length = next(index for index in range(len(by_step) + 1) if index not in by_step)
    rows = [by_step[index] for index in range(length)]
    start = statistics.fmean(found.mass for found in rows[0]) if rows else 0.0
    known = [[found.share for found in row if found.share is not None] for row in rows]
    if start <= 0 or not known[0]:
        raise ValueError(f"none of {len(problems)} problems has a first step with a gradient")
    shares = list(itertools.takewhile(bool, known))
    return MeanCurves(
        share=ShareCurve(
            mean=[statistics.fmean(row) for row in shares],
            standard_error=[statistics.stdev(row) / math.sqrt(len(row)) if len(row) > 1 else None for row in shares],
            num_problems=[len(row) for row in shares],
        ),
        mass=MassCurve(
            mean=[statistics.fmean(found.mass for found in row) / start for row in rows],
            std=[statistics.pstdev(found.mass for found in row) / start for row in rows],
            num_problems=[len(row) for row in rows],
        ),
        energy_available=[statistics.fmean(found.energy_available for found in row) for row in rows],
        energy_claimed=[statistics.fmean(found.energy_claimed for found in row) for row in rows],
    )


def traces_batch(loaded: LoadedModel, rollouts: Sequence[Rollout], temperature: float) -> GroupBatch:
    """Turn a group of stored responses into tensors.

    Prompt and response are tokenised each by itself, since that is where generation joined them; steps follow
    the tokenizer's offsets. The old log-probabilities are the model's own, so that every importance ratio is 1:
    stored traces do not have those of the sampling.

    Args:
        loaded: the model.
        rollouts: of one question, with ``prompt``, ``response`` (not empty) and ``steps``. One whose extra field
            ``finished`` is true gets the end token, unless ``ended_by_stop`` is.
        temperature: of the log-probabilities.

    Raises:
        UserError: prompts that differ within the group, or more tokens than the model's context holds.
    """
    tokenizer, first = loaded.tokenizer, rollouts[0]
    assert first.prompt is not None
    prompt_ids = encode_prompt(tokenizer, first.prompt)
    responses, steps = [], []
    for rollout in rollouts:
        assert rollout.response is not None and rollout.steps is not None
        if rollout.prompt != first.prompt:
            raise UserError(
                f"{rollout.id} and {first.id} have different prompts but one question id",
                "ids are QUESTION/NUMBER; give different questions different ids",
            )
        ids = tokenizer(rollout.response, add_special_tokens=False)["input_ids"]
        sampled_end = rollout.extra.get("finished") and not rollout.extra.get("ended_by_stop")
        if sampled_end and (ends := end_token_ids(loaded)):
            ids = [*ids, ends[0]]
        if loaded.context_length is not None and len(prompt_ids) + len(ids) > loaded.context_length:
            raise UserError(
                f"{rollout.id} has {len(prompt_ids) + len(ids)} tokens, the model's context is {loaded.context_length}",
                "leave it out of the traces",
            )
        responses.append(ids)
        steps.append(step_of_tokens(token_starts(tokenizer, ids, rollout.response), rollout.steps))
    nothing = [torch.zeros(len(ids)) for ids in responses]
    batch = make_batch(prompt_ids, responses, nothing, steps, pad_token_id=tokenizer.pad_token_id, device=loaded.device)
    with torch.no_grad():
        now = response_logprobs(loaded.model, batch, temperature)
    return GroupBatch(batch.input_ids, batch.attention_mask, batch.prompt_length, now, batch.step_ids)
