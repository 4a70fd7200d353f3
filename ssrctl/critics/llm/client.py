"""Questions to a judge through litellm: retries, fallbacks, limits and money, seen request by request.

litellm's Router keeps the models with their endpoints, keys and limits, and makes single requests. Its own retries
and fallbacks happen within one awaited call: between them nothing could be paced, reserved in the budget or noted in
the ledger. So it gets num_retries=0 (for the SDK below it, it sets that itself), and the loop over tries and models
is here. One request stays hidden: for some providers litellm sends again at once when a connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import random
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.failures import CallFailed, Failure, understand
from ssrctl.critics.llm.ledger import Call
from ssrctl.critics.llm.litellm_import import import_litellm
from ssrctl.critics.llm.meter import Meter, most_prompt_tokens
from ssrctl.critics.llm.models import JudgeModel, prepare_models
from ssrctl.critics.llm.pacing import MAX_PAUSE_S, Pacer
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["CallFailed", "CallTag", "JudgeClient", "Reply"]

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
# A server that says "slow down" is not broken: where no fallback is left, those tries do not count until a question
# has waited so long.
PATIENCE_S = 600.0
LONG_WAIT_S = 10.0  # a server that asks for more leaves the question to the fallback
TURNED_DOWN = 10  # questions refused as malformed, and none answered, after which the others are not worth asking
REST_AFTER, REST_S = 3, 60.0  # questions in a row that a model fails before its fallback is asked first, and how long
# Pydantic's warnings: of a reply of wrong types, which fails anyway, with the server's words; of litellm's own code.
NOISE = ("Pydantic serializer warnings", "Item '.*' on TypedDict class")
NO_CALLBACKS = {"no-log": True}  # of litellm's success logging we use nothing


@dataclass(frozen=True)
class CallTag:
    """What the ledger is to say about a question: the rollout's id, the step's index (None: all), and its kind."""

    id: str
    step: int | None = None
    kind: Literal["judge", "repair"] = "judge"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A judge's answer.

    Attributes:
        text: never blank.
        model: litellm name of the model that answered.
        prompt_tokens, completion_tokens: as the provider counted them; None if it did not.
        cost_usd: of the request that was answered; None when no price is known.
        latency_s: seconds that request took.
        finish_reason: ``stop``, or ``length`` when the limit on the reply cut it off.
    """

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    latency_s: float
    finish_reason: str | None


@dataclass
class _Question:
    messages: list[dict[str, str]]
    max_reply_tokens: int
    tag: CallTag
    attempts: int = 0
    may_be_billed: bool = False


class JudgeClient:
    """Asks a model, and its fallbacks in turn, through litellm. For the tasks of one event loop.

    Args:
        options: models, endpoint, temperature, time limit and retries. The endpoint is that of every model with the
            first one's provider prefix; others are asked at their own provider's.
        pacer: lets every single request wait for its turn.
        meter: every single request reserves in it what it can cost.
        on_call: told of every single request when it is over.
        schema: form of the replies, sent to models that can be bound to one.
        sleep, clock: for tests; seconds.

    Attributes:
        supports_schema: whether the first model is bound to ``schema``.

    Raises:
        UserError: litellm is not installed, a model's provider is not known, its key is not set or cannot be one.
    """

    def __init__(
        self,
        options: CriticOptions,
        pacer: Pacer,
        meter: Meter,
        on_call: Callable[[Call], None],
        *,
        schema: type[BaseModel] | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert options.critic_model is not None
        self._litellm = import_litellm()
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        self._options, self._pacer, self._meter, self._on_call = options, pacer, meter, on_call
        self._schema = schema
        self._schema_text = json.dumps(schema.model_json_schema()) if schema else ""
        self._sleep, self._clock = sleep, clock
        self._jitter = random.Random()
        self._reached = False
        self._models = prepare_models(options, schema)
        self._router = self._litellm.Router(
            model_list=[{"model_name": model.name, "litellm_params": model.parameters} for model in self._models],
            num_retries=0,
            disable_cooldowns=True,
            timeout=options.critic_timeout,
        )

    @property
    def supports_schema(self) -> bool:
        return self._schema is not None and self._models[0].reply_format is self._schema

    async def ask(self, messages: list[dict[str, str]], *, max_reply_tokens: int, tag: CallTag) -> Reply:
        """One answer to ``messages``.

        A request that fails for a passing reason is tried again ``critic_retries`` times, after growing waits; then,
        and at once when the reason will not pass, the next model is asked.

        Args:
            messages: system and user message. Lone surrogates, which cannot be sent, become question marks.
            max_reply_tokens: limit on the reply.
            tag: for the ledger.

        Raises:
            CallFailed: no model gave an answer; the class is that of the last one's failure.
            BudgetReached: what the next request can cost is not left.
            UserError: what every question would meet: a refused key, an unknown model, a server that never answered.
        """
        sendable = [
            {**message, "content": message["content"].encode("utf-8", "replace").decode("utf-8")}
            for message in messages
        ]
        question = _Question(sendable, max_reply_tokens, tag)
        now = self._clock()
        awake = [model for model in self._models if model.rests_until <= now]
        failure: Failure | None = None
        candidates = awake or self._models
        for model in candidates:
            answer = await self._ask_model(model, question, last=model is candidates[-1])
            if isinstance(answer, Reply):
                return answer
            failure = answer
        assert failure is not None
        if failure.kind == "connection" and not self._reached:
            raise UserError(
                f"no connection to the critic's server at {self._models[0].place}",
                "check --critic-api-base, and that the server runs",
            )
        raise CallFailed(failure.kind, may_be_billed=question.may_be_billed, detail=failure.detail)

    async def close(self) -> None:
        """Close the connections; to be awaited in the loop that asked, when no question is open any more."""
        from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER

        self._router.discard()
        loop = asyncio.get_running_loop()
        if getattr(GLOBAL_LOGGING_WORKER, "_bound_loop", loop) is loop:
            await GLOBAL_LOGGING_WORKER.stop()
        # litellm files the clients that it makes under names that end in their loop's id. One that stayed there,
        # closed, would be given to whoever gets a loop of the same id later.
        cache = self._litellm.in_memory_llm_clients_cache
        for key in [key for key in cache.cache_dict if key.endswith(f"-{id(loop)}")]:
            client = cache.cache_dict.pop(key)
            close = getattr(client, "close", None) or getattr(client, "aclose", None)
            with contextlib.suppress(OSError, RuntimeError):  # a connection that is gone already
                if close is not None and asyncio.iscoroutine(closing := close()):
                    await closing

    async def _ask_model(self, model: JudgeModel, question: _Question, *, last: bool) -> Reply | Failure:
        """All tries with one model; ``last``: no fallback will be asked after it."""
        left, waited, plain = self._options.critic_retries, 0.0, False
        for tries in itertools.count():
            reply_format = None if plain else model.reply_format
            answer = await self._request(model, question, reply_format)
            if isinstance(answer, Reply):
                model.answered, model.failed_in_a_row = True, 0
                if plain:
                    model.reply_format = None  # it was what the server refuses
                model.format_works |= reply_format is not None
                return answer
            question.may_be_billed |= answer.may_be_billed
            self._refuse(model, answer)
            if answer.kind == "bad_request" and reply_format is not None and not model.format_works:
                plain = True
                continue
            if answer.kind == "bad_request" and not model.answered:
                model.turned_down += 1
                if model.turned_down >= TURNED_DOWN:
                    raise UserError(
                        f"the critic's provider refuses every question to {model.name} ({answer.detail})",
                        "check --critic-model, and whether the model takes the settings that are sent",
                    )
            if not answer.passing:
                return answer
            slowed = last and answer.kind == "rate_limit"
            left -= not slowed
            asked = answer.retry_after or 0.0
            wait = asked + min(FIRST_WAIT_S * 2 ** min(tries, 10), MAX_WAIT_S) * self._jitter.uniform(0.5, 1.0)
            waited += wait
            if left < 0 or asked > (MAX_PAUSE_S if last else LONG_WAIT_S) or (slowed and waited > PATIENCE_S):
                self._rest(model, asked)
                return answer
            if asked and last:
                self._pacer.pause(asked)
            await self._sleep(wait)
        raise AssertionError  # count() has no end

    def _rest(self, model: JudgeModel, asked: float) -> None:
        """Ask the model's fallback first for a while, if it wants that or failed several questions in a row."""
        model.failed_in_a_row += 1
        if model.failed_in_a_row >= REST_AFTER:
            model.failed_in_a_row = 0
            asked = max(asked, REST_S)
        model.rests_until = max(model.rests_until, self._clock() + asked)

    async def _request(self, model: JudgeModel, question: _Question, reply_format: Any) -> Reply | Failure:
        """One request: reserved, paced, sent, settled and noted."""
        question.attempts += 1
        size = most_prompt_tokens(question.messages, self._schema_text if reply_format else "")
        reservation = await self._meter.reserve(size, question.max_reply_tokens)
        try:
            await self._pacer.wait()
        except BaseException:
            self._meter.release(reservation)
            raise
        note = functools.partial(self._note, model, question, time.perf_counter())
        failure: Failure | None = None
        try:
            # litellm's own limit is on single reads: a server that trickles would never meet it.
            async with asyncio.timeout(self._options.critic_timeout):
                response = await self._send(model, question, reply_format)
        except Exception as error:
            failure = understand(error)
        except BaseException:
            note(self._meter.forfeit(reservation), error="interrupted")
            raise
        if failure is not None:
            self._reached |= failure.reached
            cost: float | None = 0.0
            if failure.may_be_billed:
                cost = self._meter.forfeit(reservation)
            else:
                self._meter.release(reservation)
            note(cost, error=failure.kind)
            return failure
        self._reached = True
        tokens = _usage(response)
        cost = self._meter.settle(reservation, *tokens) if tokens else self._meter.forfeit(reservation)
        text, reason = _text(response)
        if not text:
            failure = _blank(reason)
            note(cost, tokens, error=failure.kind)
            return failure
        call = note(cost, tokens)
        return Reply(
            text=text,
            model=model.name,
            prompt_tokens=call.prompt_tokens,
            completion_tokens=call.completion_tokens,
            cost_usd=cost,
            latency_s=call.latency_s or 0.0,
            finish_reason=reason,
        )

    async def _send(self, model: JudgeModel, question: _Question, reply_format: Any) -> Any:
        extra = {} if reply_format is None else {"response_format": reply_format}
        return await self._router.acompletion(
            model=model.name,
            messages=question.messages,
            temperature=self._options.critic_temperature,
            max_tokens=question.max_reply_tokens,
            **extra,
            **NO_CALLBACKS,
        )

    def _note(
        self,
        model: JudgeModel,
        question: _Question,
        started: float,
        cost: float | None,
        tokens: tuple[int, int] | None = None,
        *,
        error: str | None = None,
    ) -> Call:
        call = Call(
            **asdict(question.tag),
            model=model.name,
            attempt=question.attempts,
            prompt_tokens=tokens and tokens[0],
            completion_tokens=tokens and tokens[1],
            cost_usd=cost,
            latency_s=time.perf_counter() - started,
            error=error,
        )
        self._on_call(call)
        return call

    def _refuse(self, model: JudgeModel, failure: Failure) -> None:
        """Raise what every other request would meet as well."""
        if failure.refused == "credit":
            raise UserError(
                f"the critic's provider says that the credit for {model.name} is used up",
                "top it up; what is scored is kept",
            )
        # A provider may answer so to one request alone: for what it says, or in an outage.
        if failure.refused in ("access", "model") and model.answered:
            return
        if failure.refused in ("key", "access"):  # without the provider's words, which may quote the key
            raise UserError(
                f"the critic's provider refuses the key for {model.name}", f"set {model.keys} to a valid key"
            )
        if failure.refused == "model":
            raise UserError(
                f"the critic's provider does not know {model.name} ({failure.detail})",
                "check --critic-model, --critic-fallback and --critic-api-base",
            )


def _usage(response: Any) -> tuple[int, int] | None:
    """Tokens of prompt and reply; None where the server did not count them, or cannot count."""
    usage = getattr(response, "usage", None)
    prompt, completion = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    if not isinstance(prompt, int) or not isinstance(completion, int) or prompt < 1 or completion < 0:
        return None
    return prompt, completion


def _text(response: Any) -> tuple[str, str | None]:
    """What the judge wrote, "" if nothing, and why it ended."""
    choice = next(iter(getattr(response, "choices", None) or ()), None)
    content = getattr(getattr(choice, "message", None), "content", None)
    text = content if isinstance(content, str) and content.strip() else ""
    return text, getattr(choice, "finish_reason", None)


def _blank(reason: str | None) -> Failure:
    """The failure of a reply without text."""
    if reason == "content_filter":
        return Failure(kind="content_filter", may_be_billed=True, passing=False)
    # A limit that thinking used up would be used up again.
    return Failure(kind="empty_reply", may_be_billed=True, passing=reason != "length", detail=f"ended by {reason}")
