"""The rollout critic: the share of the policy's own continuations, from the end of a step, that end right.

This is the Monte Carlo estimate of Math-Shepherd (Wang et al. 2024, "soft estimation"): the value V_i of a step
is the share of K continuations from its end whose final answer is right; V_0 is the value of the bare prompt.

- ``value``: the score is (2 V_i - 1) * 100;
- ``difference``: the score is (V_i - V_{i-1}) * 100, the change that the step made.

With K continuations the standard error of V is sqrt(V (1 - V) / K), at most 0.18 for K = 8: up to 35 points of
``value`` and, since two estimates differ, 25 points of ``difference``. The differences of a trace sum to
V_T - V_0, so noise that raises the score of one step lowers that of the next.

The final answer is right (100) or wrong (0) against the reference, and so is a response that ends without
one. Without a reference nothing can be estimated (``no_reference``). A response longer than the policy may write
(``max_new_tokens``, or the rest of the context) has no continuations of its kind (``too_long``). A continuation
whose answer could not be compared in time is left out; if none is left, the value is missing (``answer_timeout``).

Every estimate is a function of the model, the sampling settings, the seed and the tokens of the prefix; the other
rollouts of a batch do not change it. Equal prefixes within a group (above all V_0) are estimated once.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.configs import CriticOptions, SamplingConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import CriticResources, missing, scored
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.records import Rollout, StepScore
from ssrctl.io.row_fields import Reference
from ssrctl.text.answers import check_answer, check_answers
from ssrctl.text.prompts import PromptFormat, build_prompt, encode_prompt

if TYPE_CHECKING:
    from ssrctl.distributed.dividing import Spread
    from ssrctl.models.loading import LoadedModel
    from ssrctl.sampling.engines.base import Engine

# Rollouts are collected until this many batches of continuations are pending: enough to sort them by length, and
# little work to lose.
WINDOW_BATCHES = 8


@dataclass(frozen=True)
class _Prefix:
    """The beginning of a response: everything that its value depends on."""

    ids: tuple[int, ...]  # of the prompt and of the response so far
    num_prompt: int
    text: str  # of the response so far
    limit: int  # maximum number of tokens to add
    answer: Reference


@dataclass(frozen=True)
class _Value:
    """The value of a prefix: ``right`` of ``counted`` continuations end right, or the class of the ``error``.

    ``whole``: the response itself is the only continuation.
    """

    right: int = 0
    counted: int = 0
    whole: bool = False
    error: str | None = None

    @classmethod
    def of(cls, correct: Sequence[bool | None], *, whole: bool = False) -> _Value:
        """Return the value that the checked answers give; None is a comparison that timed out."""
        counted = len(correct) - correct.count(None)
        return cls(correct.count(True), counted, whole, None if counted else "answer_timeout")

    @property
    def share(self) -> float:
        return self.right / self.counted

    def __str__(self) -> str:
        if self.whole:
            return "the response ends " + ("right" if self.right else "wrong")
        return f"{self.right} of {self.counted} continuations end right"


@dataclass
class _Plan:
    """A rollout with the value of each step boundary (0 is the prompt's end).

    A boundary holds a known value, the prefix to estimate it from, or None if no score needs it.
    """

    rollout: Rollout
    boundaries: list[_Prefix | _Value | None]

    @property
    def prefixes(self) -> list[_Prefix]:
        return [boundary for boundary in self.boundaries if isinstance(boundary, _Prefix)]


@dataclass(frozen=True)
class EstimateJob:
    """Prefixes whose continuations are sampled together, for one ``repeat`` of the critic."""

    repeat: int
    prefixes: list[_Prefix]


@dataclass(frozen=True)
class Estimates:
    """The values of a job's prefixes, and counts over their continuations."""

    values: list[_Value]
    num_tokens: int
    num_unfinished: int
    num_timeouts: int


class RolloutCritic:
    """The critic that the module's docstring describes.

    Args:
        options: K (``critic_rollouts``) and the kind of score (``critic_rollout_value``).
        loaded: the policy, as it is when ``stream`` runs.
        sampling: settings of the policy's sampling; ``max_new_tokens`` covers prefix and continuation together.
        seed: seed of the continuations.
        prompt_format: the way from the question to the prompt of a record that has none.

    Attributes:
        repeat: another number gives other continuations, to measure the noise of the scores.
        spread: yields the estimates of jobs in their order; several processes may share them (``distributed.dividing``).
    """

    spread: Spread[EstimateJob, Estimates]

    def __init__(
        self,
        options: CriticOptions,
        loaded: LoadedModel,
        sampling: SamplingConfig,
        seed: int,
        prompt_format: PromptFormat | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.options, self.loaded, self.sampling, self.seed = options, loaded, sampling, seed
        self.prompt_format, self.engine = prompt_format, engine
        self.num_prefixes = self.num_shared = self.num_tokens = self.num_unfinished = self.num_timeouts = 0
        self.repeat = 0
        self.spread = lambda jobs: itertools.chain.from_iterable(map(self.estimate, jobs))
        self._warned = False

    @classmethod
    def create(cls, options: CriticOptions, resources: CriticResources) -> RolloutCritic:
        """Return the critic with the policy of ``resources``, which it loads."""
        assert resources.policy is not None, "the rollout critic needs the policy"
        loaded = resources.policy()
        engine = resources.engine(loaded)
        return cls(options, loaded, resources.sampling, resources.seed, resources.prompt_format, engine)

    @property
    def identity(self) -> str:
        """The model and every setting that the scores depend on."""
        sampling = self.sampling
        parts = [
            *(self.loaded.identity.fingerprint, self.loaded.model.dtype),
            *(self.options.critic_rollouts, self.options.critic_rollout_value, self.seed),
            *(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens),
            *map(repr, sampling.stop),
        ]
        if self.prompt_format is not None:
            parts.append(f"prompts {hashlib.sha256(repr(self.prompt_format).encode()).hexdigest()[:12]}")
        if self.engine is not None:  # which draws other continuations
            parts.append(type(self.engine).__name__)
        return "rollout " + " ".join(map(str, parts))

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout with its scores, in order, a few batches of continuations at a time.

        Raises:
            UserError: a rollout with steps has no prompt.
        """
        begun: deque[tuple[list[_Plan], list[_Prefix]]] = deque()  # of these the values are to come

        def jobs() -> Iterator[EstimateJob]:
            before: set[_Prefix] = set()
            for plans in self._windows(rollouts):
                wanted = [prefix for plan in plans for prefix in plan.prefixes]
                # Only the values of the previous window are kept: a group may span two windows.
                new = [prefix for prefix in dict.fromkeys(wanted) if prefix not in before]
                self.num_shared += len(wanted) - len(new)
                before = set(wanted)
                begun.append((plans, new))
                yield EstimateJob(self.repeat, new)

        known: dict[_Prefix, _Value] = {}
        for made in self.spread(jobs()):
            plans, new = begun.popleft()
            self._count(made)
            wanted = {prefix for plan in plans for prefix in plan.prefixes}
            known = {prefix: value for prefix, value in known.items() if prefix in wanted}
            known.update(zip(new, made.values, strict=True))
            for plan in plans:
                yield plan.rollout, self._scores(plan, known)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of estimated prefixes, continuations, sampled tokens and timeouts."""
        num_continuations = self.num_prefixes * self.options.critic_rollouts
        return {
            "prefixes": self.num_prefixes,
            "shared_prefixes": self.num_shared,
            "continuations": num_continuations,
            "continuation_tokens": self.num_tokens,
            "unfinished_frac": self.num_unfinished / num_continuations if num_continuations else None,
            "answer_timeouts": self.num_timeouts,
        }

    def close(self) -> None:
        """Do nothing: no resource is held."""

    def _windows(self, rollouts: Iterable[Rollout]) -> Iterator[list[_Plan]]:
        plans: list[_Plan] = []
        pending = 0
        for rollout in rollouts:
            plans.append(self._plan(rollout))
            pending += self.options.critic_rollouts * len(plans[-1].prefixes)
            if pending >= WINDOW_BATCHES * self.sampling.sampling_batch_size:
                yield plans
                plans, pending = [], 0
        if plans:
            yield plans

    def _plan(self, rollout: Rollout) -> _Plan:
        from ssrctl.sampling.continuations import encode_response, tokens_before

        steps = rollout.steps or []
        boundaries: list[_Prefix | _Value | None] = [None] * (len(steps) + 1)
        if not steps or rollout.answer is None:
            return _Plan(rollout, boundaries)
        assert rollout.response is not None
        prompt_ids = self._prompt_ids(rollout)
        response_ids, token_ends = encode_response(self.loaded.tokenizer, rollout.response)
        limit, context = self.sampling.max_new_tokens, self.loaded.context_length
        if context is not None:
            limit = min(limit, context - len(prompt_ids))
        fits = len(response_ids) <= limit and limit > 0
        if not fits and not self._warned:
            self._warned = True
            console.warn(
                f"response {rollout.id} has {len(response_ids)} tokens, the policy may write {max(limit, 0)}: such "
                f"responses get no scores (raise --max-new-tokens, now {self.sampling.max_new_tokens}, or use a model "
                "with a longer context)"
            )
        for boundary in self._needed(rollout):
            end = steps[boundary - 1].end if boundary else 0
            count = tokens_before(token_ends, end)
            if end == len(rollout.response) or (fits and count == limit):
                boundaries[boundary] = self._whole_value(rollout)
            elif not fits:
                boundaries[boundary] = _Value(error="too_long")
            else:
                text = rollout.response[: token_ends[count - 1]] if count else ""
                ids = (*prompt_ids, *response_ids[:count])
                boundaries[boundary] = _Prefix(ids, len(prompt_ids), text, limit - count, rollout.answer)
        return _Plan(rollout, boundaries)

    def _needed(self, rollout: Rollout) -> list[int]:
        """Return the boundaries whose values the scores of ``rollout`` need."""
        ends = {index + 1 for index, step in enumerate(rollout.steps or ()) if step.kind == "step"}
        return sorted(ends | {end - 1 for end in ends} if self.options.critic_rollout_value == "difference" else ends)

    def _prompt_ids(self, rollout: Rollout) -> list[int]:
        prompt = rollout.prompt
        if not prompt and self.prompt_format is not None and rollout.question is not None:
            prompt = build_prompt(self.loaded.tokenizer, self.prompt_format, rollout.question)
        ids = encode_prompt(self.loaded.tokenizer, prompt) if prompt else []
        if not ids:
            raise UserError(
                f"response {rollout.id} has no prompt to continue from",
                "the rollout critic needs the field 'prompt', the exact text that the model was given; the records of "
                "`ssrctl eval` and `ssrctl train` have it; or say how to make it from the question, with --prompt-template, "
                "--system-prompt or --chat-template",
            )
        return ids

    def estimate(self, job: EstimateJob) -> Iterator[Estimates]:
        """Yield the values of a job's prefixes; they depend on nothing else, and are the same in any process."""
        from ssrctl.sampling.continuations import decode_continuation
        from ssrctl.sampling.engines.base import Request, sample_all
        from ssrctl.sampling.engines.transformers_engine import TransformersEngine

        num, prefixes = self.options.critic_rollouts, job.prefixes
        seed = derive_seed(self.seed, "repeat", job.repeat) if job.repeat else self.seed
        requests = [
            Request(prefix.ids, prefix.limit, one) for prefix in prefixes for one in prefix_seeds(seed, prefix.ids, num)
        ]
        drawn = sample_all(self.engine or TransformersEngine(self.loaded, self.sampling), requests)
        pairs: list[tuple[str, Reference | None]] = []
        for number, made in enumerate(drawn):
            prefix = prefixes[number // num]
            added = decode_continuation(self.loaded.tokenizer, prefix.ids[prefix.num_prompt :], made.response_ids)
            pairs.append((prefix.text + added, prefix.answer))
        correct = [verdict.correct for verdict in check_answers(pairs, extraction=self.options.answer_extraction)]
        yield Estimates(
            values=[_Value.of(correct[start : start + num]) for start in range(0, len(correct), num)],
            num_tokens=sum(len(made.response_ids) for made in drawn),
            num_unfinished=sum(not made.finished for made in drawn),
            num_timeouts=correct.count(None),
        )

    def _count(self, made: Estimates) -> None:
        self.num_prefixes += len(made.values)
        self.num_tokens += made.num_tokens
        self.num_unfinished += made.num_unfinished
        self.num_timeouts += made.num_timeouts

    def _scores(self, plan: _Plan, known: dict[_Prefix, _Value]) -> list[StepScore]:
        steps = plan.rollout.steps or ()
        if plan.rollout.answer is None:
            return [missing("no_reference") for _ in steps]
        values = [known[value] if isinstance(value, _Prefix) else value for value in plan.boundaries]
        return [
            self._score_final(plan.rollout)
            if step.kind == "final"
            else self._score_step(values[index], values[index + 1])
            for index, step in enumerate(steps)
        ]

    def _whole_value(self, rollout: Rollout) -> _Value:
        assert rollout.response is not None
        verdict = check_answer(rollout.response, rollout.answer, extraction=self.options.answer_extraction)
        return _Value.of([verdict.correct], whole=True)

    def _score_final(self, rollout: Rollout) -> StepScore:
        value = self._whole_value(rollout)
        if value.error:
            return missing(value.error)
        return scored(100.0 * value.right, "final", "right answer" if value.right else "wrong answer")

    def _score_step(self, before: _Value | None, after: _Value | None) -> StepScore:
        assert after is not None
        if self.options.critic_rollout_value == "value":
            return missing(after.error) if after.error else scored((2 * after.share - 1) * 100, "step", str(after))
        assert before is not None
        if error := before.error or after.error:
            return missing(error)
        why = f"{after}, {before.right} of {before.counted} before"
        return scored((after.share - before.share) * 100, "step", why)


def prefix_seeds(seed: int, ids: Sequence[int], num: int) -> list[int]:
    """Return the seeds of ``num`` continuations of the tokens ``ids``; a larger ``num`` begins with the same ones."""
    digest = hashlib.sha256(array("q", ids).tobytes()).hexdigest()
    return [derive_seed(seed, "continuation", digest, number) for number in range(num)]
