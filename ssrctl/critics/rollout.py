"""The rollout critic: how often the policy itself, going on from the end of a step, reaches the right answer.

This is the Monte Carlo estimate of Math-Shepherd (Wang et al. 2024, "soft estimation"): the value V_i of a step
is the share of K continuations from its end whose final answer is right; V_0 is that of the prompt alone.

- ``value``: the score is (2 V_i - 1) * 100;
- ``difference``: the score is (V_i - V_{i-1}) * 100, what the step has changed.

With K continuations the standard error of V is sqrt(V (1 - V) / K), at most 0.18 for K = 8: up to 35 points of
``value`` and, since two estimates differ, 25 points of ``difference``. The differences of a trace sum to
V_T - V_0, so what noise gives to one step it takes from the next.

The final answer is right (100) or wrong (0) against the reference, and so is a response that ends without
one. Without a reference nothing can be estimated (``no_reference``). A response longer than the policy may write
(``max_new_tokens``, or the rest of the context) has no continuations like it (``too_long``). A continuation
whose answer could not be compared in time counts neither way; with none left the value is missing
(``answer_timeout``).

Every estimate is a function of the model, the sampling settings, the seed and the tokens of the prefix, whatever
else is scored beside it. Equal prefixes within a group (V_0 above all) are estimated once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.configs import CriticOptions, SamplingConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import missing, scored
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.records import Rollout, StepScore
from ssrctl.text.answers import Extraction, check_answer, check_answers
from ssrctl.text.prompts import encode_prompt

if TYPE_CHECKING:
    from ssrctl.models.loading import LoadedModel

# Rollouts are taken together until so many batches of continuations are due: enough to sort them by length,
# little enough to lose.
BATCHES_AT_ONCE = 8


@dataclass(frozen=True)
class _Prefix:
    """The beginning of a response: all that its value depends on."""

    ids: tuple[int, ...]  # of the prompt and of the response so far
    num_prompt: int
    text: str  # of the response so far
    limit: int  # most tokens to add
    answer: str


@dataclass(frozen=True)
class _Value:
    """``right`` of ``counted`` continuations end right; ``whole`` when the response itself is all there is."""

    right: int
    counted: int
    whole: bool = False

    @property
    def share(self) -> float:
        return self.right / self.counted

    def __str__(self) -> str:
        if self.whole:
            return "the response ends " + ("right" if self.right else "wrong")
        return f"{self.right} of {self.counted} continuations end right"


@dataclass
class _Plan:
    """A rollout and, per place between its steps (0 is the prompt's end), what is known or has to be estimated.

    A text is the error class of a value that cannot be had; None a value that nobody needs.
    """

    rollout: Rollout
    places: list[_Prefix | _Value | str | None]


class RolloutCritic:
    """See the module's text.

    Args:
        options: K (``critic_rollouts``), and whether the score is the value or its difference.
        loaded: the policy, as it is when ``stream`` runs.
        sampling: how the policy samples; ``max_new_tokens`` is for prefix and continuation together.
        seed: of the continuations.

    Attributes:
        repeat: another number gives other continuations, to measure the noise of the scores.
    """

    def __init__(self, options: CriticOptions, loaded: LoadedModel, sampling: SamplingConfig, seed: int) -> None:
        self.options, self.loaded, self.sampling, self.seed = options, loaded, sampling, seed
        self.num_prefixes = self.num_shared = self.num_tokens = self.num_unfinished = self.num_timeouts = 0
        self.repeat = 0
        self._warned = False

    @property
    def identity(self) -> str:
        """The model with every setting that decides the scores."""
        parts = [
            self.loaded.identity.fingerprint,
            self.loaded.model.dtype,
            self.options.critic_rollouts,
            self.options.rollout_value,
            self.seed,
        ]
        parts += [self.sampling.temperature, self.sampling.top_p, self.sampling.top_k, self.sampling.max_new_tokens]
        return "rollout " + " ".join(str(part) for part in parts)

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout with its scores, in order, a few batches of continuations at a time.

        Raises:
            UserError: a rollout with steps has no prompt.
        """
        known: dict[_Prefix, _Value] = {}
        for plans in self._windows(rollouts):
            wanted = [place for plan in plans for place in plan.places if isinstance(place, _Prefix)]
            # Those of the window before are kept, since a group may lie across two; older ones are not.
            known = {prefix: known[prefix] for prefix in wanted if prefix in known}
            new = [prefix for prefix in dict.fromkeys(wanted) if prefix not in known]
            self.num_shared += len(wanted) - len(new)
            known.update(zip(new, self._estimate(new), strict=True))
            for plan in plans:
                yield plan.rollout, self._scores(plan, known)

    def summary(self) -> dict[str, Any]:
        """How many places were estimated, and what sampling took."""
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
        """Nothing is held open."""

    def _windows(self, rollouts: Iterable[Rollout]) -> Iterator[list[_Plan]]:
        plans: list[_Plan] = []
        due = 0
        for rollout in rollouts:
            plans.append(self._plan(rollout))
            due += self.options.critic_rollouts * sum(isinstance(place, _Prefix) for place in plans[-1].places)
            if due >= BATCHES_AT_ONCE * self.sampling.generation_batch_size:
                yield plans
                plans, due = [], 0
        if plans:
            yield plans

    def _plan(self, rollout: Rollout) -> _Plan:
        from ssrctl.sampling.continuations import encode_response, tokens_before

        steps = rollout.steps or []
        places: list[_Prefix | _Value | str | None] = [None] * (len(steps) + 1)
        if not steps or rollout.answer is None:
            return _Plan(rollout, places)
        assert rollout.response is not None
        prompt_ids = self._prompt_ids(rollout)
        response_ids, token_ends = encode_response(self.loaded.tokenizer, rollout.response)
        limit, context = self.sampling.max_new_tokens, self.loaded.context_length
        if context is not None:
            limit = min(limit, context - len(prompt_ids))
        fits = len(response_ids) <= limit and limit > 0
        if not fits:
            self._warn_too_long(rollout, len(response_ids), limit)
        for place in self._needed(rollout):
            end = steps[place - 1].end if place else 0
            count = tokens_before(token_ends, end)
            if end == len(rollout.response) or (fits and count == limit):
                places[place] = _whole(rollout, self.options.answer_extraction)
            elif not fits:
                places[place] = "too_long"
            else:
                text = rollout.response[: token_ends[count - 1]] if count else ""
                ids = (*prompt_ids, *response_ids[:count])
                places[place] = _Prefix(ids, len(prompt_ids), text, limit - count, rollout.answer)
        return _Plan(rollout, places)

    def _needed(self, rollout: Rollout) -> list[int]:
        ends = {index + 1 for index, step in enumerate(rollout.steps or ()) if step.kind == "step"}
        return sorted(ends | {end - 1 for end in ends} if self.options.rollout_value == "difference" else ends)

    def _prompt_ids(self, rollout: Rollout) -> list[int]:
        from ssrctl.sampling.continuations import without_surrogates

        ids = encode_prompt(self.loaded.tokenizer, without_surrogates(rollout.prompt)) if rollout.prompt else []
        if not ids:
            raise UserError(
                f"response {rollout.id} has no prompt to go on from",
                "the rollout critic needs the field 'prompt', the very text the model was given; the records of "
                "`ssrctl eval` and `ssrctl train` have it",
            )
        return ids

    def _warn_too_long(self, rollout: Rollout, num_tokens: int, limit: int) -> None:
        if not self._warned:
            self._warned = True
            console.warn(
                f"response {rollout.id} has {num_tokens} tokens, the policy may write {max(limit, 0)}: such responses get "
                f"no scores (raise --max-new-tokens, now {self.sampling.max_new_tokens}, or take a longer context)"
            )

    def _estimate(self, prefixes: Sequence[_Prefix]) -> list[_Value]:
        from ssrctl.sampling.continuations import Start, decode_continuation, sample_continuations

        num = self.options.critic_rollouts
        seed = derive_seed(self.seed, "repeat", self.repeat) if self.repeat else self.seed
        starts = [
            Start(prefix.ids, prefix.limit, one) for prefix in prefixes for one in prefix_seeds(seed, prefix.ids, num)
        ]
        drawn = sample_continuations(self.loaded, starts, self.sampling)
        self.num_prefixes += len(prefixes)
        self.num_tokens += sum(len(made.ids) for made in drawn)
        self.num_unfinished += sum(not made.finished for made in drawn)
        pairs: list[tuple[str, str | None]] = []
        for place, made in enumerate(drawn):
            prefix = prefixes[place // num]
            added = decode_continuation(self.loaded.tokenizer, prefix.ids[prefix.num_prompt :], made.ids)
            pairs.append((prefix.text + added, prefix.answer))
        correct = [verdict.correct for verdict in check_answers(pairs, extraction=self.options.answer_extraction)]
        self.num_timeouts += correct.count(None)
        shares = [correct[start : start + num] for start in range(0, len(correct), num)]
        return [_Value(mine.count(True), num - mine.count(None)) for mine in shares]

    def _scores(self, plan: _Plan, known: dict[_Prefix, _Value]) -> list[StepScore]:
        rollout = plan.rollout
        if rollout.answer is None:
            return [missing("no_reference") for _ in rollout.steps or ()]
        values = [known[place] if isinstance(place, _Prefix) else place for place in plan.places]
        out = []
        for index, step in enumerate(rollout.steps or ()):
            if step.kind == "final":
                out.append(_score_final(rollout, self.options.answer_extraction))
            elif self.options.rollout_value == "value":
                out.append(_score_value(values[index + 1]))
            else:
                out.append(_score_difference(values[index], values[index + 1]))
        return out


def prefix_seeds(seed: int, ids: Sequence[int], num: int) -> list[int]:
    """The seeds of ``num`` continuations of the tokens ``ids``; the first few of more are the same."""
    digest = hashlib.sha256(array("q", ids).tobytes()).hexdigest()
    return [derive_seed(seed, "continuation", digest, number) for number in range(num)]


def _whole(rollout: Rollout, answer_extraction: Extraction) -> _Value | str:
    assert rollout.response is not None
    correct = check_answer(rollout.response, rollout.answer, extraction=answer_extraction).correct
    return "answer_timeout" if correct is None else _Value(int(correct), 1, whole=True)


def _score_final(rollout: Rollout, answer_extraction: Extraction) -> StepScore:
    value = _whole(rollout, answer_extraction)
    if isinstance(value, str):
        return missing(value)
    return scored(100.0 * value.right, "final", "right answer" if value.right else "wrong answer")


def _error(value: _Value | str | None) -> str | None:
    assert value is not None
    if isinstance(value, str):
        return value
    return None if value.counted else "answer_timeout"


def _score_value(value: _Value | str | None) -> StepScore:
    if error := _error(value):
        return missing(error)
    assert isinstance(value, _Value)
    return scored((2 * value.share - 1) * 100, "step", str(value))


def _score_difference(before: _Value | str | None, after: _Value | str | None) -> StepScore:
    if error := _error(before) or _error(after):
        return missing(error)
    assert isinstance(before, _Value) and isinstance(after, _Value)
    return scored((after.share - before.share) * 100, "step", f"{after}, {before.right} of {before.counted} before")
