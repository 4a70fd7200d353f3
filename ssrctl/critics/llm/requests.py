"""What the llm critic asks about a response, and what the replies are filed under."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.cache import cache_key
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


class Questions:
    """The calls that a response needs under given options.

    A call is named by the index of the step that it asks about, or by None when it asks about all of them.

    Args:
        options: models, rubric and manner.

    Attributes:
        models: litellm names, the first choice first.
        identity: names the critic and everything that its scores depend on.
        repeat: number of the judgement; another number is filed apart, so that it is asked anew.

    Raises:
        UserError: the rubric is not found.
    """

    def __init__(self, options: CriticOptions) -> None:
        assert options.critic_model is not None
        self.options = options
        self.rubric = load_rubric(options.rubric)
        self.models = [options.critic_model, *options.critic_fallback]
        self.repeat = 0
        settings = [self._decisive(model) for model in self.models]
        decisive = [settings, self.rubric.text, options.per_step, options.show_reference]
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self.identity = f"llm {self.models[0]} {digest[:12]}"

    def calls(self, rollout: Rollout) -> list[int | None]:
        """The calls that score ``rollout``; none when it has no step."""
        if not rollout.steps:
            return []
        return list(range(len(rollout.steps))) if self.options.per_step else [None]

    def wanted(self, rollout: Rollout, index: int | None) -> list[tuple[int, str]]:
        """The scores that a call is to give: (number of the step, counted from 1; its kind). The steps that do not
        fit the judge are not among them; with none that fits there is nothing to ask."""
        return asked_steps(rollout, index, reference=self.options.show_reference)

    def messages(self, rollout: Rollout, index: int | None) -> list[dict[str, str]]:
        """The chat messages of a call."""
        reference = self.options.show_reference
        if index is None:
            return trace_messages(self.rubric, rollout, reference=reference)
        return step_messages(self.rubric, rollout, index, reference=reference)

    def most_reply_tokens(self, num_scores: int) -> int:
        """The limit on a reply with so many scores."""
        return self.options.critic_thinking_tokens + REPLY_TOKENS_PER_STEP * num_scores

    def keys(self, rollout: Rollout, index: int | None) -> dict[str, str]:
        """By model, the key under which its reply to a call is kept."""
        text = request_text(self.rubric, rollout, index, reference=self.options.show_reference)
        return {
            model: cache_key(self._decisive(model) | {"text": text, "repeat": self.repeat}) for model in self.models
        }

    def _decisive(self, model: str) -> dict[str, Any]:
        """What a reply depends on beside the text."""
        return {
            "critic": "llm",
            "model": model,
            "api_base": self.options.critic_api_base,
            "prompt_version": PROMPT_VERSION,
            "temperature": self.options.critic_temperature,
        }
