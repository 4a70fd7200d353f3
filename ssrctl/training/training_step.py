"""One training step: sample groups, score their steps, credit them, update.

How this differs from SSR as published: the learning signal of a question is divided by the number of
questions in the batch, so that the learning rate does not depend on it; a missing score is left out rather
than counted as a number; the default advantage is eq. 6 (see ``--advantage``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.budget import step_budgets
from ssrctl.core.claims import KeptUnit
from ssrctl.core.engine_gap import Gap, engine_correction, measure_gap
from ssrctl.core.losses import k3, response_weights
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import Unit, plan_units, steps_with_signal
from ssrctl.critics.base import Critic
from ssrctl.critics.rewards import Rewards
from ssrctl.critics.scoring import score_groups
from ssrctl.distributed.dealing import Share, deal_questions, teams
from ssrctl.distributed.sharding import ResponseShare, ShardedModel, noticing_lost_processes
from ssrctl.distributed.world import ALONE, World
from ssrctl.errors import UserError
from ssrctl.io.mask_log import QuestionLog, UnitLog
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.engines.base import Engine, StaleSamples
from ssrctl.sampling.engines.transformers_engine import TransformersEngine
from ssrctl.sampling.groups import Group, Prompted, join_groups, sample_groups
from ssrctl.training.credit import group_advantages
from ssrctl.training.process_work import ProcessWork
from ssrctl.training.reference import StartWeights
from ssrctl.training.sign_shares import SignSums, sign_sums
from ssrctl.training.step_gradients.accumulated import fixed_logprobs
from ssrctl.training.step_gradients.batch import group_batch, response_logprobs
from ssrctl.training.step_gradients.head import HeadSettings
from ssrctl.training.step_gradients.parts import QuestionPart, responses_by_step, units_of_parts
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import GroupBatch, NonFiniteLoss, UnitGradient, trainable, unit_gradients
from ssrctl.training.unit_observer import QuestionView, UnitObserver, Wanted
from ssrctl.training.updaters import QuestionUpdate, Updater
from ssrctl.training.weight_pushes import WeightPushes

T = TypeVar("T")
_Key = tuple[int, int]  # number of a question, and rank of a process
_Sampled = tuple[Share, Group]

LOWER_RATE = "start from an earlier checkpoint with a lower --learning-rate, or use --dtype float32"


class NonFiniteBatch(UserError):
    """A batch without any finite gradient.

    Attributes:
        weights_changed: True if an earlier pass over the batch (``--num-iterations``) was applied, so that the weights
            are those of half a step.
    """

    def __init__(self, message: str, remedy: str | None = None, *, weights_changed: bool = False) -> None:
        super().__init__(message, remedy)
        self.weights_changed = weights_changed


@dataclass
class StepResult:
    """The result of one training step.

    Attributes:
        metrics: the row for metrics.jsonl; every key is defined in docs/metrics.md.
        groups: the sampled and scored responses.
        mask_log: per question, the units' selections; empty unless requested.
        gradient: the sketch (float64) of the batch's gradient before masking, the sum over its questions' units; None
            unless requested.
    """

    metrics: dict[str, Any]
    groups: list[Group]
    mask_log: list[QuestionLog]
    gradient: Tensor | None = None


@dataclass
class _StepTotals:
    """Sums over the questions of a step."""

    losses: list[float] = field(default_factory=list)
    terms: int = 0
    clipped: int = 0
    gaps: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    corrected: int = 0
    correction_hits: int = 0
    entropy_sum: float = 0.0
    num_units: int = 0
    granted_frac: list[float] = field(default_factory=list)
    granted_budget_frac: list[float] = field(default_factory=list)
    non_finite: int = 0
    without_signal: int = 0
    resampled: int = 0
    batch_tokens: float = 0.0
    kl_sum: float = 0.0
    signs: SignSums = field(default_factory=SignSums)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"push": 0.0, "sample": 0.0, "score": 0.0, "reference": 0.0, "old_logprobs": 0.0}
    )

    def add_first_pass(self, logprobs: Tensor, batch: GroupBatch) -> None:
        """Add what the first pass over a question shows, before any update."""
        assert batch.engine_logprobs is not None
        apart = (logprobs - batch.engine_logprobs)[batch.known]
        self.gaps.append(apart[~apart.isnan()].cpu())
        self.tokens += apart.numel()
        if batch.correction is not None:
            self.corrected += batch.correction.num_spans
            self.correction_hits += batch.correction.num_hit
        if batch.reference is not None:
            self.kl_sum += float(k3(logprobs, batch.reference, batch.known).double().sum())

    def add(self, other: _StepTotals) -> None:
        """Add those of one question; sums of floats depend on the order of the questions."""
        for spec in dataclasses.fields(self):
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            if spec.name not in ("batch_tokens", "seconds"):  # of the whole step
                setattr(self, spec.name, mine + theirs)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def add_entropy(self, entropy: Tensor) -> None:
        """Add entropies ``[G, R]``, 0 in the padding, of the tokens that ``add_first_pass`` counts."""
        self.entropy_sum += float(entropy.double().sum())

    def add_update(self, update: QuestionUpdate, num_unprotected: int) -> None:
        self.losses.append(sum(made.loss for made in update.gradients))
        self.terms += sum(made.num_terms for made in update.gradients)
        self.clipped += sum(made.num_clipped for made in update.gradients)
        self.num_units += len(update.gradients)
        self.granted_frac.append(sum(update.granted) / num_unprotected)


@dataclass(frozen=True)
class _Own:
    """This process's share of a question.

    Attributes:
        batch: its responses.
        part: their place in the question; None where all are this process's.
    """

    share: Share
    batch: GroupBatch
    part: QuestionPart | None


@dataclass
class _Learned:
    """The records of one question in one pass over the batch, of those processes that share it.

    Attributes:
        totals: of this question.
        log: its selections, where they are wanted.
        sketch: of its gradient, float64, where it is wanted; on the CPU when another process sums it.
    """

    totals: _StepTotals
    log: QuestionLog | None = None
    sketch: Tensor | None = None


class TrainingStep:
    """The training step of a run: sample, score, credit, update.

    With several processes each samples and learns from its own questions, and every process applies the update of all;
    results are gathered in the order of the questions, so that they are those of one process.

    Args:
        loaded: the model in training.
        critic: scores the responses; None in a process that scores none.
        updater: updates the weights.
        config: the run's settings.
        curve: the budget profile v_1..; ``[1.0]`` for equal budgets.
        observer: reads gradients for the logs; None reads none.
        pushes: the engine that samples the responses, and its weights; None is transformers in this process.
        world: the processes that share a batch.
        sharded: the model, where each of the processes has a shard of it: all learn from every question then, each
            from some of its responses. None where each has the whole model.
        rewards: rewards of the responses in place of the scores of their final answers.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        critic: Critic | None,
        updater: Updater,
        config: TrainConfig,
        curve: Sequence[float],
        observer: UnitObserver | None = None,
        pushes: WeightPushes | None = None,
        world: World = ALONE,
        sharded: ShardedModel | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        self.rewards = rewards
        self.world, self.work, self.sharded = world, ProcessWork(world), sharded
        self.loaded, self.critic, self.updater, self.config, self.curve = loaded, critic, updater, config, curve
        self.observer, self.pushes = observer, pushes
        self.engine: Engine = TransformersEngine(loaded, config) if pushes is None else pushes.engine
        named = dict(trainable(loaded.model) if sharded is None else sharded.local_parameters())
        self.start_weights = StartWeights(named, copies=sharded is not None) if config.keeps_start_weights else None
        self.exchanges = world.size > 1 and sharded is None
        self.num_coordinates = loaded.num_parameters
        self.num_unprotected = self.num_coordinates - updater.num_protected

    def run(
        self,
        prompts: Sequence[Prompted],
        *,
        seed: int,
        log_masks: bool,
        log_gradient: bool = False,
        log_base_kl: bool = False,
        log_signs: bool = False,
    ) -> StepResult:
        """Sample, score and learn from one batch of questions.

        Args:
            prompts: the questions of this step.
            seed: of the sampling.
            log_masks: return the selections, and gradient cosines if the config asks for them.
            log_gradient: return the sketch of the batch's gradient.
            log_base_kl: measure the KL divergence from the start model also without ``--beta``.
            log_signs: measure the shares of positive and negative advantages in the update.

        Raises:
            NonFiniteBatch: every question of the batch gave a NaN or infinite loss or gradient in a pass over it.
            Stopped: the engine that samples is gone, or has other weights than these; none has changed since the step before.
        """
        with noticing_lost_processes(self.world):
            return self._run(prompts, seed, log_masks, log_gradient, log_base_kl, log_signs)

    def _run(
        self,
        prompts: Sequence[Prompted],
        seed: int,
        log_masks: bool,
        log_gradient: bool,
        log_base_kl: bool,
        log_signs: bool,
    ) -> StepResult:
        config, totals, world = self.config, _StepTotals(), self.world
        with_reference = config.beta > 0 or log_base_kl
        pushed: dict[str, Any] = {}
        if self.pushes is not None:
            with totals.timed("push"):
                pushed = self.pushes.push()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        groups = self._scored_groups(prompts, seed, totals)
        scored = time.perf_counter()
        plans = [self._credit(group, totals) for group in groups]
        totals.batch_tokens = sum(sum(self._trained_lengths(group)) for group in groups) / len(groups)
        costs = [_costs(group, units) for group, units in zip(groups, plans, strict=True)]
        if self.sharded is None:
            shares = deal_questions(costs, world.size)[world.rank]
        else:  # every process has a shard of every question's gradient
            shares = deal_questions(costs, 1)[0]
        mine = [
            self._own(share, groups[share.question], plans[share.question], totals, with_reference) for share in shares
        ]
        mask_log: list[QuestionLog] = []
        gradient: Tensor | None = None
        update_metrics: dict[str, float | None] = {}
        for iteration in range(config.num_iterations):
            wanted = self._wanted(log_masks, log_gradient) if iteration == 0 else Wanted()
            dropped_before = totals.non_finite
            learned: dict[_Key, _Learned] = {}
            updates: dict[int, QuestionUpdate] = {}
            with self.work.learning([one.share for one in mine]):
                for one in mine:
                    share, number = one.share, one.share.question
                    group = groups[number]
                    own = learned[number, world.rank] = _Learned(_StepTotals(batch_tokens=totals.batch_tokens))
                    observed = self.observer is not None and bool(wanted)
                    view = self.observer.question(wanted) if self.observer and observed and share.leads else None
                    if not plans[number]:
                        continue
                    update = self._learn(
                        group,
                        one,
                        plans[number],
                        len(groups),
                        own.totals,
                        view,
                        is_first=iteration == 0,
                        observed=observed,
                        log_signs=log_signs and iteration == 0,
                    )
                    if update is None:
                        continue
                    if log_masks and iteration == 0 and update.kept:
                        own.log = self._question_log(group, update, view)
                    if view is not None and view.sketched is not None:
                        own.sketch = view.sketched if world.size == 1 else view.sketched.cpu()
                    if self.exchanges:  # to be exchanged; one process has added it already
                        updates[number] = update
            logs, sketches = self._gathered(learned, totals)
            mask_log += logs
            for sketch in sketches:
                gradient = sketch if gradient is None else gradient + sketch
            if totals.non_finite - dropped_before == len(groups):
                raise NonFiniteBatch(
                    f"the loss or gradient of all {len(groups)} questions is NaN or infinite",
                    LOWER_RATE,
                    weights_changed=iteration > 0,
                )
            self.updater.exchange(updates)
            try:
                update_metrics = (self.pushes or self.updater).step()
            except NonFiniteGradient as error:
                raise NonFiniteBatch(
                    f"summed over the batch, {error}", LOWER_RATE, weights_changed=iteration > 0
                ) from error
        before = totals.seconds["reference"] + totals.seconds["old_logprobs"]
        totals.seconds["update"] = time.perf_counter() - scored - before
        metrics = self._metrics(groups, totals, with_reference) | update_metrics | pushed
        if log_signs:
            metrics |= totals.signs.metrics()
        work = self.work.shares(self.loaded.model.parameters() if self.sharded is None else None)
        return StepResult(metrics | work, groups, mask_log, gradient)

    def _scored_groups(self, prompts: Sequence[Prompted], seed: int, totals: _StepTotals) -> list[Group]:
        """Sample and score the questions; sample those without a signal again, as often as the settings allow."""

        def made(wanted: Sequence[Prompted], seed: int) -> list[Group]:
            with totals.timed("sample"):
                mine = self._drawn(lambda: self.world.together(lambda: self._sample(wanted, seed)))
            with totals.timed("score"):
                return self._drawn(lambda: self._scored(mine))

        groups = made(prompts, seed)
        for again in range(self.config.resample_without_signal):
            silent = [place for place, group in enumerate(groups) if not steps_with_signal(self._advantages(group)[0])]
            if not silent:
                break
            totals.resampled += len(silent)
            fresh = made([prompts[place] for place in silent], derive_seed(seed, "resample", again))
            for place, group in zip(silent, fresh, strict=True):
                groups[place] = group
        return groups

    def _drawn(self, call: Callable[[], T]) -> T:
        """Call what samples; once more, after all processes have healed the engine, if all raise StaleSamples."""
        try:
            return call()
        except StaleSamples as stale:
            if self.pushes is None or self.world.size == 1:  # which has healed it
                raise
            self.pushes.engine.heal(stale.message)
        return call()

    def _sample(self, prompts: Sequence[Prompted], seed: int) -> list[_Sampled]:
        """Sample this process's responses."""
        config, world = self.config, self.world
        count = config.num_generations
        # also where only some of them are sampled again
        splits = world.size > config.questions_per_step
        costs = [[float(len(prompt.prompt_ids))] * count for prompt in prompts]
        mine = deal_questions(costs, world.size, split=splits)[world.rank]

        def sample(shares: Sequence[Share], own_seed: int, numbers: Sequence[int] | None = None) -> list[_Sampled]:
            groups = sample_groups(
                self.loaded,
                [prompts[share.question] for share in shares],
                config,
                num_generations=count,
                seed=own_seed,
                segmentation=config,
                engine=self.engine,
                numbers=numbers,
            )
            return list(zip(shares, groups, strict=True))

        with self.work.sampling(), self._passes_together():
            if config.sample_together == "question" or splits:
                seeds = [derive_seed(seed, "question", share.question) for share in mine]
                return [sample([one], own, one.responses)[0] for one, own in zip(mine, seeds, strict=True)]
            own_seed = seed if world.size == 1 else derive_seed(seed, "process", world.rank)
            return sample(mine, own_seed) if mine else []

    def _scored(self, mine: list[_Sampled]) -> list[Group]:
        """Return the groups of all processes with scores, in the order of the questions.

        The main process asks the critic for all, so that there is one budget, cache and log of calls. The rollout critic
        samples from the policy, which every process has: each scores its own groups, one at a time.
        """
        config, world = self.config, self.world
        if config.critic == "rollout" and config.sample_together == "question":
            assert self.critic is not None
            critic = self.critic

            def score_own() -> None:
                with self._passes_together():
                    for _, group in mine:
                        score_groups([group], critic, config.answer_extraction, self.rewards)

            world.together(score_own)
            return _whole_groups(world.gather(mine))
        parts = world.gather_on_main(mine)

        def score() -> list[Group]:
            assert self.critic is not None
            groups = _whole_groups(parts)
            score_groups(groups, self.critic, config.answer_extraction, self.rewards)
            return groups

        return world.on_main(score)

    def _gathered(self, mine: dict[_Key, _Learned], totals: _StepTotals) -> tuple[list[QuestionLog], list[Tensor]]:
        """Add the questions of all processes to ``totals``; return their logs and sketches, in the main process."""
        world = self.world if self.exchanges else ALONE  # each process with a shard has the records of all questions
        for one in _in_order(world.gather({key: found.totals for key, found in mine.items()})):
            totals.add(one)
        records = _in_order(world.gather_on_main({key: (found.log, found.sketch) for key, found in mine.items()}))
        return [log for log, _ in records if log is not None], [one for _, one in records if one is not None]

    def _advantages(self, group: Group) -> tuple[Sequence[Sequence[float | None]], int]:
        config = self.config
        return group_advantages(
            group,
            config.credit,
            config.advantage,
            mask_truncated=config.mask_truncated,
            sign=config.advantage_sign,
        )

    def _trained_lengths(self, group: Group) -> list[int]:
        """Return the tokens of each response that the loss may train; 0 where the response is masked."""
        masks = self.config.mask_truncated
        return [0 if masks and not sample.finished else len(sample.response_ids) for sample in group.samples]

    def _own(self, share: Share, group: Group, units: list[Unit], totals: _StepTotals, with_reference: bool) -> _Own:
        """Return this process's share of a question as tensors; those of a question without a unit are not needed."""
        batch = group_batch(self.loaded, group, whole_response=self.config.credit != "step")
        part = None if len(share.team) == 1 else QuestionPart.of(batch, units, share.responses)
        batch = batch if part is None else part.batch
        return _Own(share, self._prepared(batch, totals, with_reference) if units else batch, part)

    def _prepared(self, batch: GroupBatch, totals: _StepTotals, with_reference: bool) -> GroupBatch:
        """Return a batch with what stays the same in all passes over it.

        A log-probability that the engine did not give is the trainer's own, as all are with ``--old-logprobs trainer``.
        """
        config = self.config
        engine = batch.engine_logprobs
        assert engine is not None
        missing = engine.isnan()
        if config.resolved_old_logprobs == "trainer" or bool(missing.any()):
            with totals.timed("old_logprobs"):
                own = self._logprobs(batch)
            from_trainer = missing if config.resolved_old_logprobs == "engine" else torch.ones_like(missing)
            batch = dataclasses.replace(batch, old_logprobs=torch.where(from_trainer, own, batch.old_logprobs))
        if config.engine_correction != "none":
            correction = engine_correction(
                batch.old_logprobs,
                engine,
                batch.step_ids,
                kind=config.engine_correction,
                level=config.correction_level,
                cap=config.engine_correction_cap,
            )
            batch = dataclasses.replace(batch, correction=correction)
        if self.start_weights is not None and with_reference:
            with totals.timed("reference"), self.start_weights.in_place():
                batch = dataclasses.replace(batch, reference=self._logprobs(batch))
        return batch

    def _logprobs(self, batch: GroupBatch) -> Tensor:
        config = self.config
        settings = HeadSettings(config.temperature, config.logit_chunk_tokens)
        if self.sharded is None:
            return fixed_logprobs(self.loaded.model, batch, settings, config.micro_batch_tokens)
        self.sharded.settle()
        share = self._share(batch)
        with torch.no_grad():
            own = response_logprobs(self.loaded.model, batch, settings=settings, rows=share.rows)
        self.sharded.settle()
        return share.whole(own, own.shape[1])

    def _share(self, batch: GroupBatch) -> ResponseShare:
        """Return the responses of a question that this process runs through the sharded model."""
        assert self.sharded is not None
        return self.sharded.share(batch.known.sum(1).tolist())

    def _passes_together(self) -> contextlib.AbstractContextManager[None]:
        """Let each process run the model as often as it needs to sample."""
        if self.sharded is None or self.pushes is not None:
            return contextlib.nullcontext()
        return self.sharded.each_as_often(whole=self.config.gathers_whole)

    def _wanted(self, log_masks: bool, log_gradient: bool) -> Wanted:
        sets = log_masks and self.config.optimizer == "kronos"
        return Wanted(sets=sets, conflict=sets and self.config.log_gradient_cosine, sketch=log_gradient)

    def _credit(self, group: Group, totals: _StepTotals) -> list[Unit]:
        """Write a group's advantages into its records, and return the update units that follow from them."""
        config = self.config
        values, num_without_signal = self._advantages(group)
        totals.without_signal += num_without_signal
        for rollout, row in zip(group.rollouts, values, strict=True):
            rollout.advantages = list(row)
        longest = max((len(row) for row in values), default=0)
        budgets = step_budgets(
            self.curve,
            longest,
            budget=config.budget,
            max_step_budget=config.max_step_budget,
            rule=config.budget_rule,
            silent=set(range(longest)) - steps_with_signal(values),
        )
        return self.updater.plan(plan_units(values, budgets, fuse_tol=config.fuse_tol, max_units=config.max_units))

    def _learn(
        self,
        group: Group,
        own: _Own,
        units: list[Unit],
        num_questions: int,
        totals: _StepTotals,
        view: QuestionView | None,
        *,
        is_first: bool,
        observed: bool,
        log_signs: bool,
    ) -> QuestionUpdate | None:
        """Backpropagate one question; drop and count it if a loss or gradient is NaN or infinite.

        Only the first pass over a batch measures the gap of the log-probabilities: later ones see updated weights.
        Processes that share the question all call this; the first of them returns the update and counts it.
        """

        def before_unit(unit: Unit) -> None:
            if view is not None:
                view.before_unit(unit)
            self.updater.before_unit(unit)

        part = own.part
        backpropagate = functools.partial(self._gradients, group, own, num_questions, totals.batch_tokens)
        gradients = backpropagate(
            units if part is None else part.own_units,
            on_logprobs=lambda logprobs: totals.add_first_pass(logprobs, own.batch) if is_first else None,
            on_entropy=totals.add_entropy if is_first else None,
            on_unit=before_unit if part is None else None,
            beta=self.config.beta,
            num_responses=None if part is None else part.num_responses,
        )
        if part is not None:
            team = self.world.team(teams(num_questions, self.world.size))
            combine = functools.partial(self.updater.combine, team, whole=observed)
            gradients = units_of_parts(part, gradients, team, combine=combine, on_unit=before_unit)
        with contextlib.ExitStack() as stack:
            if view is not None:
                gradients = stack.enter_context(contextlib.closing(view.watch(gradients)))
            try:
                update = self.updater.add_question(gradients)
            except (NonFiniteLoss, NonFiniteGradient):
                totals.non_finite += own.share.leads
                return None
        if not own.share.leads:
            return None
        if log_signs:
            assert self.observer is not None and part is None, "the configuration refuses it"
            of_units = functools.partial(backpropagate, num_responses=responses_by_step(own.batch, units))
            learned = [made.unit for made in update.gradients]
            update.signs = sign_sums(self.observer.named, learned, update.kept, self.observer.frozen, of_units)
            totals.signs = sum(update.signs, SignSums())
        totals.add_update(update, self.num_unprotected)
        if update.granted and self._fills_budget(group):
            totals.granted_budget_frac.append(sum(update.granted) / (self.config.budget * self.num_unprotected))
        return update

    def _gradients(
        self, group: Group, own: _Own, num_questions: int, batch_tokens: float, units: Sequence[Unit], **settings: Any
    ) -> Iterator[UnitGradient]:
        """Backpropagate units of a question with the run's settings; ``settings`` are those in which passes differ."""
        config = self.config
        lengths = torch.tensor(self._trained_lengths(group), device=self.loaded.device)
        weights = response_weights(config.loss_type, lengths, longest=config.max_new_tokens, batch_tokens=batch_tokens)
        return unit_gradients(
            self.loaded.model,
            own.batch,
            units,
            temperature=config.temperature,
            clip_epsilon=config.clip_epsilon,
            level=config.importance_level,
            loss_scale=1.0 / num_questions,
            method=config.step_gradient_method,
            micro_batch_tokens=config.micro_batch_tokens,
            logit_chunk_tokens=config.logit_chunk_tokens,
            dials=Dials(config.units_at_once, config.gradient_chunk_tokens),
            epsilon_high=config.epsilon_high,
            token_weights=weights if own.part is None or weights is None else weights[own.share.responses],
            share=None if self.sharded is None else self._share(own.batch),
            **settings,
        )

    def _fills_budget(self, group: Group) -> bool:
        """Return True if T k_max >= B (to float rounding), where T is the number of steps that have a signal."""
        heard = len(steps_with_signal([rollout.advantages or () for rollout in group.rollouts]))
        return heard * self.config.max_step_budget >= self.config.budget * (1 - 1e-9)

    def _kept_sets(self, kept: KeptUnit) -> dict[str, Tensor]:
        """Return a unit's set: ascending flat indices by name, in a sharded run those of all processes, on the main one."""
        sets = {name: indices.to_indices().cpu() for name, indices in kept.sets.items()}
        return sets if self.sharded is None else self.sharded.whole_indices(sets)

    def _question_log(self, group: Group, update: QuestionUpdate, view: QuestionView | None) -> QuestionLog:
        shapes = self.loaded.shapes()
        units = []
        for place, (made, kept) in enumerate(zip(update.gradients, update.kept, strict=True)):
            unit = UnitLog(
                steps=list(made.unit.steps),
                budget=made.unit.budget,
                advantages=[a for column in made.unit.advantages for a in column if a is not None],
                mask=BlockMask.from_indices(shapes, self._kept_sets(kept)),
            )
            if update.signs:
                unit.positive_norm = update.signs[place].positive ** 0.5
                unit.negative_norm = update.signs[place].negative ** 0.5
            if view is not None:
                seen = view.units[place]
                unit.gradient_norm, unit.captured = seen.square**0.5, seen.captured(kept)
                unit.unconstrained_captured = seen.top_captured
                if seen.top is not None:
                    unit.unconstrained = BlockMask.from_indices(shapes, {n: i.cpu() for n, i in seen.top.items()})
            units.append(unit)
        log = QuestionLog(id=group.id, units=units)
        if view is not None and view.wanted.conflict:
            found = view.conflict()
            log.gradient_cosine, log.conflict = found.cosine, found.shares
        return log

    def _metrics(self, groups: list[Group], totals: _StepTotals, with_reference: bool) -> dict[str, Any]:
        seconds = totals.seconds
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        samples = [sample for group in groups for sample in group.samples]
        scores = [score for rollout in rollouts for score in rollout.scores or ()]
        known = [score.reward for score in scores if score.reward is not None]
        lengths = [len(sample.response_ids) for sample in samples]
        num_tokens = sum(lengths)
        kl = {}
        if self.start_weights is not None:
            kl["kl_to_start"] = totals.kl_sum / totals.tokens if totals.tokens and with_reference else None
            kl["reference_seconds"] = seconds["reference"]
        return {
            "reward": statistics.fmean(known) if known else None,
            "accuracy": _share(rollout.final is not None and rollout.final.correct is True for rollout in rollouts),
            "answered_frac": _share(r.final is not None and r.final.extracted is not None for r in rollouts),
            "unmarked_frac": _share(r.final is None or r.final.way in (None, "last-number") for r in rollouts),
            "finished_frac": _share(sample.finished for sample in samples),
            "steps_per_response": statistics.fmean(len(rollout.steps or ()) for rollout in rollouts),
            "no_step_responses": sum(1 for rollout in rollouts if not rollout.steps),
            "missing_score_frac": (len(scores) - len(known)) / len(scores) if scores else None,
            "no_signal_responses": totals.without_signal,
            "resampled_questions": totals.resampled,
            "non_finite_questions": totals.non_finite,
            "loss": statistics.fmean(totals.losses) if totals.losses else None,
            "clip_frac": totals.clipped / totals.terms if totals.terms else 0.0,
            **self._engine_metrics(totals),
            "entropy": totals.entropy_sum / totals.tokens if totals.tokens else None,
            "num_units": totals.num_units,
            "granted_frac": statistics.fmean(totals.granted_frac) if totals.granted_frac else 0.0,
            "granted_budget_frac": (
                statistics.fmean(totals.granted_budget_frac) if totals.granted_budget_frac else None
            ),
            **kl,
            "response_tokens": num_tokens,
            "response_tokens_mean": statistics.fmean(lengths),
            "response_tokens_max": max(lengths),
            "tokens_per_second": num_tokens / max(sum(seconds.values()), 1e-9),
            "sample_seconds": seconds["sample"],
            "score_seconds": seconds["score"],
            "update_seconds": seconds["update"],
            "peak_memory_bytes": _peak_memory_bytes(),
        }

    def _engine_metrics(self, totals: _StepTotals) -> dict[str, float | None]:
        """Return the metrics of the gap between engine and trainer, and of its correction."""
        config = self.config
        above = config.clip_epsilon if config.epsilon_high is None else config.epsilon_high
        gap = measure_gap(torch.cat([*totals.gaps, torch.empty(0)]), low=1 - config.clip_epsilon, high=1 + above)
        known = sum(len(part) for part in totals.gaps)
        found: dict[str, float | None] = {
            f"logprob_gap_{spec.name}": None if gap is None else getattr(gap, spec.name)
            for spec in dataclasses.fields(Gap)
        }
        found["missing_logprob_frac"] = 1 - known / totals.tokens if totals.tokens else None
        if config.resolved_old_logprobs == "trainer":
            found["old_logprobs_seconds"] = totals.seconds["old_logprobs"]
        if config.engine_correction != "none":
            found["correction_hit_frac"] = totals.correction_hits / totals.corrected if totals.corrected else None
        return found


def _in_order(parts: Sequence[dict[_Key, T]]) -> list[T]:
    """Return the values of all processes by ascending key."""
    return [found for _, found in sorted(itertools.chain(*(part.items() for part in parts)), key=lambda item: item[0])]


def _whole_groups(parts: Sequence[list[_Sampled]]) -> list[Group]:
    """Return the groups of all questions, in order, from what each process has sampled."""
    found: dict[int, list[tuple[Sequence[int], Group]]] = {}
    for share, group in itertools.chain(*parts):
        found.setdefault(share.question, []).append((share.responses, group))
    return [join_groups(found[question]) for question in sorted(found)]


def _costs(group: Group, units: Sequence[Unit]) -> list[float]:
    """Predict the cost of each response's update: tokens that go forward once, and backward for each unit."""
    tokens = [len(group.prompted.prompt_ids) + len(sample.response_ids) for sample in group.samples]
    return [float(count * (1 + 2 * len(units))) for count in tokens]


def _peak_memory_bytes() -> int | None:
    """Return the most memory in use: on CUDA of tensors since the step began, otherwise of the process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0
