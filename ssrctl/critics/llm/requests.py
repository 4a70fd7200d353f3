"""The requests that score a response, and the cache keys of their replies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.cache import cache_key
from ssrctl.critics.llm.prices import most_reply_tokens
from ssrctl.critics.llm.prompt import (
    PROMPT_VERSION,
    asked_steps,
    load_rubric,
    request_text,
    step_messages,
    trace_messages,
)
from ssrctl.io.records import Rollout

REPLY_TOKENS_PER_STEP = 96  # a score, a rationale of 20 words and the json around them
STEPS_PER_THINKING_LIMIT = 4  # steps that --critic-thinking-tokens is for
MAX_THINKING_TOKENS = 16_384  # unless more are wanted; many servers refuse a limit near their context's length


class JudgeRequests:
    """The requests that a response needs under the given options.

    A request is named by the index of the step that it asks about, or by None when it asks about all steps.

    Args:
        options: models, rubric and one request per response or per step.

    Attributes:
        models: litellm names, the first choice first.
        identity: names the critic and everything that its scores depend on.
        repeat: number of the judgement; each number has cache keys of its own, so that another one asks again.

    Raises:
        UserError: the rubric is not found.
    """

    def __init__(self, options: CriticOptions) -> None:
        assert options.critic_model is not None
        self.options = options
        self.rubric = load_rubric(options.critic_rubric)
        self.models = [options.critic_model, *options.critic_fallback]
        self.repeat = 0
        limits = [most for model in self.models if (most := most_reply_tokens(model)) is not None]
        self._most_tokens = min(limits, default=None)
        settings = [self._key_parts(model) for model in self.models]
        decisive = [settings, self.rubric.text, options.critic_per_step, options.critic_show_reference]
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self.identity = f"llm {self.models[0]} {digest[:12]}"

    def of(self, rollout: Rollout) -> list[int | None]:
        """Return the requests that score ``rollout``; none when it has no step."""
        if not rollout.steps:
            return []
        return list(range(len(rollout.steps))) if self.options.critic_per_step else [None]

    def wanted(self, rollout: Rollout, index: int | None) -> list[tuple[int, str]]:
        """Return the (number from 1, kind) of each step that a request asks to score.

        Steps that do not fit into the prompt are left out. With an empty result there is nothing to ask.
        """
        return asked_steps(rollout, index, reference=self.options.critic_show_reference)

    def messages(self, rollout: Rollout, index: int | None) -> list[dict[str, str]]:
        """Return the chat messages of a request."""
        reference = self.options.critic_show_reference
        if index is None:
            return trace_messages(self.rubric, rollout, reference=reference)
        return step_messages(self.rubric, rollout, index, reference=reference)

    def max_reply_tokens(self, num_scores: int) -> int:
        """Return the token limit of a reply with ``num_scores`` scores, thoughts included.

        ``critic_max_tokens`` where it is given. Otherwise the room for the scores plus that for the thoughts, which
        grows with the number of scores; no more than litellm's table says the models can write.
        """
        if self.options.critic_max_tokens is not None:
            return self.options.critic_max_tokens
        given = self.options.critic_thinking_tokens
        grown = given * max(num_scores, STEPS_PER_THINKING_LIMIT) // STEPS_PER_THINKING_LIMIT
        wanted = min(grown, max(given, MAX_THINKING_TOKENS)) + REPLY_TOKENS_PER_STEP * num_scores
        return wanted if self._most_tokens is None else min(wanted, self._most_tokens)

    def cache_keys(self, rollout: Rollout, index: int | None) -> dict[str, str]:
        """Return the cache key of the reply to a request, by model."""
        text = request_text(self.rubric, rollout, index, reference=self.options.critic_show_reference)
        parts = {"text": text, "repeat": self.repeat}
        return {model: cache_key(self._key_parts(model) | parts) for model in self.models}

    def _key_parts(self, model: str) -> dict[str, Any]:
        """Return everything that a reply depends on besides the request's text."""
        parts: dict[str, Any] = {
            "critic": "llm",
            "model": model,
            "api_base": self.options.critic_api_base,
            "prompt_version": PROMPT_VERSION,
            "temperature": self.options.critic_temperature,
        }
        # Absent where they are not set, so that replies from before these settings keep their keys.
        if self.options.critic_reasoning_effort is not None:
            parts["reasoning_effort"] = self.options.critic_reasoning_effort
        if body := self.options.critic_extra_body_object:
            parts["extra_body"] = body
        return parts
