"""Step probabilities by a process reward model behind a pooling server (vLLM's ``/pooling`` and ``/classify``).

Requests hold token ids, made by the model's own tokenizer here: no text can be taken for markup, and every row of the
reply has its step. ``/pooling`` replies with one row per token, or one per step where the server pools by steps
(``--pooler-config '{"pooling_type": "STEP", "step_tag_id": ...}'``); ``/classify`` with one row per input, which is
asked for each step.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ssrctl.configs import CriticOptions, ModelConfig
from ssrctl.configs.engines import KEY_VARIABLE
from ssrctl.critics.prm.local import style_of
from ssrctl.critics.prm.styles import Encoded, Encoder
from ssrctl.errors import UserError
from ssrctl.io.json_requests import NoAnswer, Refused, ask
from ssrctl.models.loading import read_tokenizer

_PATHS = ("/pooling", "/classify")
_SHARED_FAILURES = (401, 403, 404)  # every request would meet them


class ServerScorer:
    """A process reward model behind ``--critic-api-base``.

    The model's name is that under which the server has it; its tokenizer is read from ``--critic-prm-tokenizer``, else
    from the folder or hub name that the model's name is.

    Raises:
        UserError: no tokenizer, or no token for the step tag.
    """

    context_length: int | None = None  # the server's to say

    def __init__(self, options: CriticOptions) -> None:
        assert options.critic_model is not None and options.critic_api_base is not None
        config = ModelConfig(model=options.critic_prm_tokenizer or options.critic_model)
        style = style_of(options, config)
        self.encoder = Encoder(style, read_tokenizer(config), config.model, options.critic_prm_step_tag)
        self._options = options
        self._url = _endpoint(options.critic_api_base)
        self._pool = ThreadPoolExecutor(options.critic_max_concurrency)
        self._answered = threading.Event()
        self.identity = f"{self._url} {options.critic_model} {style.name} {self.encoder.tag!r}"

    def probabilities(self, inputs: Sequence[Encoded]) -> list[list[float] | str]:
        """Return the probability that each step is right, in [0, 1], or the error class of the request.

        Raises:
            UserError: no request was answered so far and this one cannot be, or the rows do not match the steps.
        """
        return list(self._pool.map(self._one, inputs))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _one(self, one: Encoded) -> list[float] | str:
        body: dict[str, Any] = {"model": self._options.critic_model}
        classify = self._url.endswith("/classify")
        body["input"] = [one.ids[: place + 1] for place in one.places] if classify else one.ids
        reply = self._ask(body)
        if isinstance(reply, str):
            return reply
        return [self._probability(row) for row in self._rows(reply, one, classify)]

    def _rows(self, reply: Any, one: Encoded, classify: bool) -> list[Any]:
        data = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise UserError(f"{self._url} replied without the list 'data'", "name a pooling server of vLLM")
        if classify:
            rows = [item.get("probs") for item in sorted(data, key=lambda item: item.get("index", 0))]
        else:
            rows = data[0].get("data") if len(data) == 1 else None  # type: ignore[assignment]
            if isinstance(rows, list) and len(rows) == len(one.ids) != len(one.places):
                rows = [rows[place] for place in one.places]
        if not isinstance(rows, list) or len(rows) != len(one.places):
            count = len(rows) if isinstance(rows, list) else "no"
            raise UserError(
                f"{self._url} replied with {count} rows for {len(one.places)} steps in {len(one.ids)} tokens",
                "let the server pool by steps (--pooler-config with step_tag_id) or by tokens",
            )
        return rows

    def _probability(self, row: Any) -> float:
        """Return the probability in a row of two scores, or of one; scores that are no probabilities are logits."""
        numbers = row if isinstance(row, list) else [row]
        known = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
        if len(numbers) not in (1, 2) or not known:
            raise UserError(
                f"{self._url} replied with {len(numbers)} scores a step, expected one or two numbers",
                "let the server return the two candidate tokens only (returned_token_ids in --pooler-config)",
            )
        if len(numbers) == 1:
            return numbers[0] if 0 <= numbers[0] <= 1 else _sigmoid(numbers[0])
        # A classifier's label 1 is right; of candidates, the first.
        right, wrong = numbers if self.encoder.candidates else reversed(numbers)
        if min(numbers) >= 0 and abs(sum(numbers) - 1) < 0.01:
            return float(min(right, 1.0))
        return _sigmoid(right - wrong)

    def _ask(self, body: dict[str, Any]) -> Any:
        """Return the parsed reply, or the class of the error that is left after the retries."""
        attempt = 0
        while True:
            try:
                reply = ask(self._url, body, seconds=self._options.critic_timeout)
                self._answered.set()
                return reply
            except (NoAnswer, Refused) as error:
                kind, transient = _classified(error)
                if transient and attempt < self._options.critic_retries:
                    time.sleep(min(2.0**attempt, 30.0))
                    attempt += 1
                    continue
                if isinstance(kind, int) or not self._answered.is_set():
                    raise UserError(f"{self._url} does not answer: {error}", _remedy(kind)) from None
                return kind


def _endpoint(base: str) -> str:
    base = base.rstrip("/")
    return base if base.endswith(_PATHS) else base.removesuffix("/v1") + _PATHS[0]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _classified(error: NoAnswer | Refused) -> tuple[str | int, bool]:
    """Return the error class (or the status that every request shares), and True if a retry may help."""
    if isinstance(error, NoAnswer):
        return "api_error" if error.kind == "not json" else error.kind, True
    if error.status in _SHARED_FAILURES:
        return error.status, False
    if error.status == 429:
        return "rate_limit", True
    if error.status < 500:
        return ("context_window" if "context length" in str(error) else "bad_request"), False
    return "api_error", True


def _remedy(kind: str | int) -> str:
    if kind in (401, 403):
        return f"set the variable {KEY_VARIABLE}"
    if kind == 404:
        return "check the address and the model's name on the server"
    return "check --critic-api-base, and that the server is up"
