"""What a run of the llm critic will take, before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.cache import ReplyCache, default_cache_dir
from ssrctl.critics.llm.litellm_import import import_litellm
from ssrctl.critics.llm.meter import find_prices
from ssrctl.critics.llm.requests import REPLY_TOKENS_PER_STEP, Questions
from ssrctl.io.records import Rollout

COUNTED = 50  # calls whose tokens are counted exactly; the others are known by their length
ASSUMED_SECONDS = 5.0  # of one call


@dataclass
class Estimate:
    """Sums over calls, and what follows from them.

    Args:
        options: the critic's.

    Raises:
        UserError: litellm is not installed, the rubric is not found, or there is a budget without a price.
    """

    options: CriticOptions
    calls: int = 0
    cached: int = 0
    num_scores: int = 0
    bytes: int = 0
    _counted: list[tuple[int, int]] = field(default_factory=list)  # (bytes, tokens)

    def __post_init__(self) -> None:
        self.questions = Questions(self.options)
        self.prices = find_prices(self.questions.models, self.options.input_price, self.options.output_price)

    def add_all(self, rollouts: Iterable[Rollout]) -> None:
        """Count the calls that ``rollouts`` need and whose replies are not kept."""
        litellm = import_litellm()
        folder = self.options.cache_dir or default_cache_dir()
        # A cache that is not there yet is not made by asking what a run would cost.
        cache = ReplyCache(folder) if self.options.cache and folder.is_dir() else None
        try:
            for rollout in rollouts:
                for index in self.questions.calls(rollout):
                    if not self.questions.wanted(rollout, index):
                        continue
                    if cache is not None and any(map(cache.get, self.questions.keys(rollout, index).values())):
                        self.cached += 1
                    else:
                        self._add(litellm, rollout, index)
        finally:
            if cache is not None:
                cache.close()

    def _add(self, litellm: Any, rollout: Rollout, index: int | None) -> None:
        messages = self.questions.messages(rollout, index)
        size = sum(len(message["content"].encode()) for message in messages)
        if self.calls < COUNTED:
            self._counted.append((size, litellm.token_counter(model=self.questions.models[0], messages=messages)))
        self.calls += 1
        self.bytes += size
        self.num_scores += len(self.questions.wanted(rollout, index))

    def plan(self) -> dict[str, Any]:
        """Calls, tokens, US dollars and seconds. Expected ones count no thinking and no second try; the most that one
        try of every call can cost counts replies of full length."""
        counted = [sum(column) for column in zip(*self._counted, strict=True)]
        prompt_tokens = round(self.bytes * counted[1] / counted[0]) if self.calls else 0
        reply_tokens = REPLY_TOKENS_PER_STEP * self.num_scores
        most_reply_tokens = reply_tokens + self.calls * self.options.critic_thinking_tokens
        seconds = self.calls * ASSUMED_SECONDS / self.options.max_concurrency
        if self.options.requests_per_minute is not None:
            seconds = max(seconds, 60 * self.calls / self.options.requests_per_minute)
        plan: dict[str, Any] = {
            "calls": self.calls,
            "kept_replies": self.cached,
            "prompt_tokens": prompt_tokens,
            "reply_tokens": reply_tokens,
            "most_reply_tokens": most_reply_tokens,
        }
        if self.prices is None:
            plan["cost_usd"] = None
        else:
            plan["cost_usd"] = float(self.prices.cost(prompt_tokens, reply_tokens))
            plan["most_cost_usd"] = float(self.prices.cost(prompt_tokens, most_reply_tokens))
        return plan | {"budget_usd": self.options.budget_usd, "minutes": round(seconds / 60, 2)}
