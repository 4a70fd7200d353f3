"""The prm critic: a process reward model gives every step the probability p that it is right.

The score of a step is 200 p - 100 and that of a final answer 100 p, so that both have the reward 2 p - 1.
``--critic-prm-zero Z`` moves the zero from p = 1/2 to p = Z: below Z a step scores 100 (p - Z) / Z, above it
100 (p - Z) / (1 - Z), and a final answer half of that plus 50. The reference answer is not used.

Steps are the record's character spans, whatever tokens the policy had; ``ssrctl.critics.prm.styles`` says where the
model reads them. White space around a step is not read, and a blank step is missing (``empty_step``). A response
beyond the model's context is read up to its last step that fits; later steps are missing (``context_window``). One that
holds the step tag itself is missing (``tag_in_text``): its steps could not be told from those that it makes up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ssrctl.configs import CriticOptions
from ssrctl.critics.base import CriticResources, missing, scored
from ssrctl.critics.llm.cache import Reply, ReplyCache, cache_key, default_cache_dir
from ssrctl.critics.prm.styles import Encoded, Encoder
from ssrctl.io.records import Rollout, StepScore

WINDOW_BATCHES = 8  # batches that are sorted by length together
CACHE_FORM = "prm 1"  # of the inputs that a probability belongs to


class Scorer(Protocol):
    """A process reward model, here or behind a server."""

    identity: str
    context_length: int | None
    encoder: Encoder

    def probabilities(self, inputs: Sequence[Encoded]) -> Sequence[list[float] | str]:
        """Return the probability of each place of each input, or an error class for all of an input's."""

    def close(self) -> None:
        """Release threads."""


@dataclass
class _Plan:
    """A rollout with its model input; ``numbers`` are the steps that the input's places score."""

    rollout: Rollout
    errors: dict[int, str]
    numbers: list[int]
    encoded: Encoded | None = None
    found: list[float] | str = ""


class PRMCritic:
    """The critic that the module's docstring describes.

    Args:
        options: the zero of the scores and the batch size.
        scorer: the model.
        cache: keeps probabilities between runs; None keeps none.
    """

    def __init__(self, options: CriticOptions, scorer: Scorer, cache: ReplyCache | None = None) -> None:
        self.options, self.scorer, self.cache = options, scorer, cache
        self.num_scored = self.num_cached = self.num_tokens = self.num_cut = 0

    @classmethod
    def create(cls, options: CriticOptions, resources: CriticResources) -> PRMCritic:
        """Return the critic with its model, which it loads unless a server has it."""
        scorer: Scorer
        if options.critic_api_base is not None:
            from ssrctl.critics.prm.server import ServerScorer

            scorer = ServerScorer(options)
        else:
            from ssrctl.critics.prm.local import LocalScorer

            scorer = LocalScorer(options, resources.device)
        folder = options.critic_cache_dir or default_cache_dir() if options.critic_cache else None
        return cls(options, scorer, None if folder is None else ReplyCache(folder))

    @property
    def identity(self) -> str:
        """The model and every setting that the scores depend on."""
        return f"prm {self.scorer.identity} zero {self.options.critic_prm_zero:g}"

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout with its scores, in order, a few batches at a time.

        Raises:
            UserError: the server answers nothing, or not for every step; the model's scores are not finite.
        """
        rollouts = iter(rollouts)
        while plans := [self._plan(one) for one in islice(rollouts, WINDOW_BATCHES * self.options.critic_batch_size)]:
            self._judge([plan for plan in plans if plan.encoded is not None])
            for plan in plans:
                yield plan.rollout, self._scores(plan)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of responses that the model read, of those from the cache, of tokens and of cut responses."""
        return {
            "prm_responses": self.num_scored,
            "prm_cached": self.num_cached,
            "prm_tokens": self.num_tokens,
            "prm_beyond_context": self.num_cut,
        }

    def close(self) -> None:
        """Release the cache and the server's threads."""
        self.scorer.close()
        if self.cache is not None:
            self.cache.close()

    def _plan(self, rollout: Rollout) -> _Plan:
        texts = [rollout.step_text(index) for index in range(len(rollout.steps or ()))]
        numbers = [index for index, text in enumerate(texts) if text.strip()]
        plan = _Plan(rollout, {index: "empty_step" for index in range(len(texts)) if index not in numbers}, numbers)
        if not numbers:
            return plan
        encoded = self.scorer.encoder.encode(rollout.question or "", [texts[index] for index in numbers])
        if encoded.num_stray:
            plan.errors.update(dict.fromkeys(numbers, "tag_in_text"))
            return plan
        limit = self.scorer.context_length
        kept = [place for place in encoded.places if limit is None or place < limit]
        if len(kept) < len(numbers):
            self.num_cut += 1
            plan.errors.update(dict.fromkeys(numbers[len(kept) :], "context_window"))
            plan.numbers = numbers[: len(kept)]
        if kept:
            plan.encoded = replace(encoded, ids=encoded.ids[: kept[-1] + 1], places=kept)
        return plan

    def _judge(self, plans: list[_Plan]) -> None:
        keys = [self._key(plan) for plan in plans]
        waiting: dict[str, list[_Plan]] = {}
        for key, plan in zip(keys, plans, strict=True):
            reply = None if self.cache is None else self.cache.get(key)
            if reply is None:
                waiting.setdefault(key, []).append(plan)
            else:
                plan.found = json.loads(reply.text)
                self.num_cached += 1
        inputs = [same[0].encoded for same in waiting.values()]
        results = self.scorer.probabilities([one for one in inputs if one is not None]) if inputs else []
        for (key, same), found in zip(waiting.items(), results, strict=True):
            for plan in same:
                plan.found = found
            if isinstance(found, str):
                continue
            self.num_scored += 1
            self.num_tokens += len(same[0].encoded.ids) if same[0].encoded else 0
            if self.cache is not None:
                self.cache.put(key, Reply(json.dumps(found), self.scorer.identity, None, None, None))

    def _key(self, plan: _Plan) -> str:
        assert plan.encoded is not None
        return cache_key(
            {"form": CACHE_FORM, "model": self.scorer.identity, "ids": plan.encoded.ids, "places": plan.encoded.places}
        )

    def _scores(self, plan: _Plan) -> list[StepScore]:
        if isinstance(plan.found, str):
            known: dict[int, float] = {}
            plan.errors.update({index: plan.found for index in plan.numbers if index not in plan.errors})
        else:
            known = dict(zip(plan.numbers, plan.found, strict=True))
        return [
            missing(plan.errors[index]) if index in plan.errors else self._score(known[index], step.kind)
            for index, step in enumerate(plan.rollout.steps or ())
        ]

    def _score(self, share: float, kind: str) -> StepScore:
        zero = self.options.critic_prm_zero
        score = 100 * (share - zero) / (zero if share < zero else 1 - zero)
        return scored(score / 2 + 50 if kind == "final" else score, kind, f"p = {share:.4f}")
