"""Estimate the calls, tokens, cost and time of a run of the llm critic before anything is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.cache import ReplyCache, default_cache_dir
from ssrctl.critics.llm.litellm_import import import_litellm
from ssrctl.critics.llm.prices import find_prices
from ssrctl.critics.llm.requests import REPLY_TOKENS_PER_STEP, JudgeRequests
from ssrctl.io.records import Rollout

NUM_TOKENISED = 50  # calls whose tokens are counted exactly; those of the others are estimated from their length
ASSUMED_SECONDS = 5.0  # of one call


@dataclass
class Estimate:
    """Sums over the calls of a run, and their cost.

    Args:
        options: settings of the critic.

    Raises:
        UserError: litellm is not installed, the rubric is not found, or there is a budget without a price.
    """

    options: CriticOptions
    calls: int = 0
    cached: int = 0
    num_scores: int = 0
    most_reply_tokens: int = 0
    bytes: int = 0
    _counted: list[tuple[int, int]] = field(default_factory=list)  # (bytes, tokens)

    def __post_init__(self) -> None:
        self.requests = JudgeRequests(self.options)
        self.prices = find_prices(
            self.requests.models, self.options.critic_input_price, self.options.critic_output_price
        )

    def add_all(self, rollouts: Iterable[Rollout]) -> None:
        """Count the calls that ``rollouts`` need; replies in the cache are counted apart."""
        litellm = import_litellm()
        folder = self.options.critic_cache_dir or default_cache_dir()
        # An estimate does not create a cache.
        cache = ReplyCache(folder) if self.options.critic_cache and folder.is_dir() else None
        with contextlib.closing(cache) if cache else contextlib.nullcontext():
            for rollout in rollouts:
                for index in self.requests.of(rollout):
                    wanted = self.requests.wanted(rollout, index)
                    if wanted and cache and any(map(cache.get, self.requests.cache_keys(rollout, index).values())):
                        self.cached += 1
                    elif wanted:
                        self._add(litellm, rollout, index, len(wanted))

    def _add(self, litellm: Any, rollout: Rollout, index: int | None, num_scores: int) -> None:
        messages = self.requests.messages(rollout, index)
        size = sum(len(message["content"].encode()) for message in messages)
        if self.calls < NUM_TOKENISED:
            self._counted.append((size, litellm.token_counter(model=self.requests.models[0], messages=messages)))
        self.calls += 1
        self.bytes += size
        self.num_scores += num_scores
        self.most_reply_tokens += self.requests.max_reply_tokens(num_scores)

    def plan(self) -> dict[str, Any]:
        """Return calls, tokens, US dollars and minutes.

        The expected numbers assume no thinking and no retry; ``most_`` numbers are those of one try of every call
        with replies of maximum length.
        """
        counted = [sum(column) for column in zip(*self._counted, strict=True)]
        prompt_tokens = round(self.bytes * counted[1] / counted[0]) if self.calls else 0
        reply_tokens = REPLY_TOKENS_PER_STEP * self.num_scores
        seconds = self.calls * ASSUMED_SECONDS / self.options.critic_max_concurrency
        if self.options.critic_requests_per_minute is not None:
            seconds = max(seconds, 60 * self.calls / self.options.critic_requests_per_minute)
        plan: dict[str, Any] = {
            "calls": self.calls,
            "kept_replies": self.cached,
            "prompt_tokens": prompt_tokens,
            "reply_tokens": reply_tokens,
            "most_reply_tokens": self.most_reply_tokens,
        }
        if self.prices is None:
            plan["cost_usd"] = None
        else:
            plan["cost_usd"] = self.prices.cost(prompt_tokens, reply_tokens)
            plan["most_cost_usd"] = self.prices.cost(prompt_tokens, self.most_reply_tokens)
        return plan | {"budget_usd": self.options.critic_budget_usd, "minutes": round(seconds / 60, 2)}
