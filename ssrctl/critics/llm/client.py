"""Prompts to a judge through litellm, with retries, fallbacks, rate limit and budget applied to every request.

litellm's Router keeps the models with their endpoints, keys and limits, and makes single requests. Its own retries
and fallbacks happen within one awaited call: between them nothing could be paced, reserved in the budget or noted in
the ledger. So it gets num_retries=0 (it sets the same for the SDK below it), and the loop over retries and models
is here. One request stays hidden: for some providers litellm sends again at once when a connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import random
import re
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssrctl.configs import CriticOptions
from ssrctl.critics.base import SETTINGS_ERRORS
from ssrctl.critics.llm.cache import Reply
from ssrctl.critics.llm.failures import CallFailed, Failure, classify_failure
from ssrctl.critics.llm.ledger import Call
from ssrctl.critics.llm.litellm_import import import_litellm, warm_up
from ssrctl.critics.llm.meter import Meter, max_prompt_tokens
from ssrctl.critics.llm.models import JudgeModel, prepare_models
from ssrctl.critics.llm.pacing import MAX_PAUSE_S, Pacer, Silence
from ssrctl.errors import Stopped, UserError
from ssrctl.io import console

if TYPE_CHECKING:
    from pydantic import BaseModel

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
MAX_DETAIL_CHARS = 300  # of a server's words, shown and noted
PATIENCE_S = 600.0  # a run in which no prompt is answered for this long ends
# A server that asks to slow down is not broken: where no fallback is left, rate-limited tries do not count as retries
# until a prompt has waited this long.
MAX_RATE_LIMIT_WAIT_S = PATIENCE_S
LONG_WAIT_S = 10.0  # if a server asks for a longer wait, the prompt goes to the fallback
MAX_REJECTED = 10  # prompts rejected as malformed, with none answered, after which the run ends
COOLDOWN_AFTER, COOLDOWN_S = 3, 60.0  # failed prompts in a row after which the fallback is asked first, and how long
# Warnings of pydantic: on a reply of wrong types, which fails anyway, with the server's text; on litellm's own code.
NOISE = ("Pydantic serializer warnings", "Item '.*' on TypedDict class")
NO_CALLBACKS = {"no-log": True}  # litellm's success logging is not used


@dataclass(frozen=True)
class CallTag:
    """The ledger's entries about a prompt: the rollout's id, the step's index (None: all steps), and the kind."""

    id: str
    step: int | None = None
    kind: Literal["judge", "repair"] = "judge"


@dataclass
class _PendingPrompt:
    messages: list[dict[str, str]]
    max_reply_tokens: int
    tag: CallTag
    attempts: int = 0
    may_be_billed: bool = False


class JudgeClient:
    """Asks a model, and its fallbacks in turn, through litellm. For the tasks of one event loop.

    Args:
        options: models, endpoint, temperature, timeout and retries. The endpoint is that of every model with the
            first one's provider prefix; the others use their own provider's endpoint.
        pacer: spaces the requests.
        meter: reserves the maximum cost of every request.
        on_call: called with every request when it is over.
        schema: schema of the replies, sent to models with structured output.
        sleep, clock: for tests; seconds.

    Raises:
        UserError: litellm is not installed, a model's provider is not known, its key is not set or malformed.
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
        self._schema_text = json.dumps(schema.model_json_schema()) if schema else ""
        self._sleep, self._clock = sleep, clock
        self._jitter = random.Random()
        self._silence = Silence(clock)
        # A server that hangs is asked twice, also with a timeout longer than the patience.
        self._patience = max(PATIENCE_S, 2 * options.critic_timeout)
        self._warming = asyncio.Lock()
        self._warm = False
        self._reached = False
        self._known_failures: set[str] = set()
        self._models = prepare_models(options, schema)
        self._router = self._litellm.Router(
            model_list=[{"model_name": model.name, "litellm_params": model.parameters} for model in self._models],
            num_retries=0,
            disable_cooldowns=True,
            timeout=options.critic_timeout,
        )

    async def ask(self, messages: list[dict[str, str]], *, max_reply_tokens: int, tag: CallTag) -> Reply:
        """Return one reply to ``messages``.

        A transient failure is retried ``critic_retries`` times, after growing waits; then, and at once after a
        permanent failure, the next model is asked.

        Args:
            messages: system and user message. Lone surrogates, which cannot be sent, become question marks.
            max_reply_tokens: token limit of the reply.
            tag: for the ledger.

        Raises:
            CallFailed: no model gave a reply; the class is that of the last model's failure.
            BudgetReached: the budget has no room for the next request.
            UserError: every prompt would fail: a refused key, an unknown model, a server that never answered.
            Stopped: no prompt was answered for the time of the patience.
        """
        async with self._warming:
            if not self._warm:
                await warm_up(self._router, self._models[0].name)
                self._warm = True
        sendable = [
            {**message, "content": message["content"].encode("utf-8", "replace").decode("utf-8")}
            for message in messages
        ]
        prompt = _PendingPrompt(sendable, max_reply_tokens, tag)
        now = self._clock()
        candidates = [model for model in self._models if model.cooldown_until <= now] or self._models
        failure: Failure | None = None
        with self._silence:
            for model in candidates:
                answer = await self._ask_model(model, prompt, last=model is candidates[-1])
                if isinstance(answer, Reply):
                    return answer
                failure = answer
        assert failure is not None
        if failure.kind == "connection" and not self._reached:
            raise UserError(
                f"no connection to the critic's server at {self._models[0].endpoint}",
                "check --critic-api-base and that the server is running",
            )
        raise CallFailed(failure.kind, may_be_billed=prompt.may_be_billed, detail=failure.detail)

    async def close(self) -> None:
        """Close the connections; to be awaited in the loop that asked, when no prompt is pending."""
        from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER

        self._router.discard()
        loop = asyncio.get_running_loop()
        if getattr(GLOBAL_LOGGING_WORKER, "_bound_loop", loop) is loop:
            await GLOBAL_LOGGING_WORKER.stop()
        # litellm caches its clients under names that end in their loop's id. A closed one that stayed there would be
        # reused by a later loop with the same id.
        cache = self._litellm.in_memory_llm_clients_cache
        for key in [key for key in cache.cache_dict if key.endswith(f"-{id(loop)}")]:
            client = cache.cache_dict.pop(key)
            close = getattr(client, "close", None) or getattr(client, "aclose", None)
            with contextlib.suppress(OSError, RuntimeError):  # a connection that is gone already
                if close is not None and asyncio.iscoroutine(closing := close()):
                    await closing

    async def _ask_model(self, model: JudgeModel, prompt: _PendingPrompt, *, last: bool) -> Reply | Failure:
        """Ask one model, with its retries; ``last``: no fallback will be asked after it."""
        left, waited, plain = self._options.critic_retries, 0.0, False
        for tries in itertools.count():
            reply_format = None if plain else model.reply_format
            answer = await self._request(model, prompt, reply_format)
            if isinstance(answer, Reply):
                model.answered, model.failed_in_a_row = True, 0
                if plain:
                    self._drop_format(model)
                model.format_works |= reply_format is not None
                return answer
            prompt.may_be_billed |= answer.may_be_billed
            self._raise_if_fatal(model, answer)
            if reply_format is not None and not model.format_works and _may_refuse_format(answer):
                plain = True
                continue
            self._raise_if_silent(model, answer)
            if answer.kind == "bad_request" and not model.answered:
                model.num_rejected += 1
                if model.num_rejected >= MAX_REJECTED:
                    raise UserError(
                        f"the critic's provider refuses all {MAX_REJECTED} prompts to {model.name} ({answer.detail})",
                        "check --critic-model, and whether the model accepts the critic's settings",
                    )
            if not answer.transient:
                return answer
            slowed = last and answer.kind == "rate_limit"
            left -= not slowed
            pause = answer.retry_after or 0.0
            wait = pause + min(FIRST_WAIT_S * 2 ** min(tries, 10), MAX_WAIT_S) * self._jitter.uniform(0.5, 1.0)
            waited += wait
            too_long = pause > (MAX_PAUSE_S if last else LONG_WAIT_S) or (slowed and waited > MAX_RATE_LIMIT_WAIT_S)
            if left < 0 or too_long:
                self._cool_down(model, pause)
                return answer
            if pause and last:
                self._pacer.pause(pause)
            await self._sleep(wait)
        raise AssertionError  # count() has no end

    def _drop_format(self, model: JudgeModel) -> None:
        """Ask no model of this endpoint for a form of reply again, since the server answers only without one."""
        if model.reply_format is not None:
            console.note(f"{model.endpoint} refuses response_format: replies are asked for without it from now on")
        for other in self._models:
            if other.endpoint == model.endpoint and not other.format_works:
                other.reply_format = None

    def _cool_down(self, model: JudgeModel, seconds: float) -> None:
        """Ask the model's fallback first for ``seconds``, and longer after several failed prompts in a row."""
        model.failed_in_a_row += 1
        if model.failed_in_a_row >= COOLDOWN_AFTER:
            model.failed_in_a_row = 0
            seconds = max(seconds, COOLDOWN_S)
        model.cooldown_until = max(model.cooldown_until, self._clock() + seconds)

    async def _request(self, model: JudgeModel, prompt: _PendingPrompt, reply_format: Any) -> Reply | Failure:
        """Make one request: reserve, pace, send, settle and note it."""
        prompt.attempts += 1
        size = max_prompt_tokens(prompt.messages, self._schema_text if reply_format else "")
        reservation = await self._meter.reserve(size, prompt.max_reply_tokens)
        try:
            await self._pacer.wait()
        except BaseException:
            self._meter.release(reservation)
            raise
        note = functools.partial(self._note, model, prompt, time.perf_counter())
        failure: Failure | None = None
        try:
            # litellm's own timeout is for single reads: a server that sends byte by byte would never reach it.
            async with asyncio.timeout(self._options.critic_timeout):
                response = await self._send(model, prompt, reply_format)
        except Exception as error:
            failure = classify_failure(error)
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
            note(cost, error=failure.kind, detail=self._first_words(model, failure))
            return failure
        self._reached = True
        tokens = _usage(response)
        cost = self._meter.settle(reservation, *tokens) if tokens else self._meter.forfeit(reservation)
        text, reason = _reply_text(response)
        if reason == "length" and _is_thinking(response, text):
            failure = self._thinking_cut(prompt, tokens)
        elif not text:
            failure = _empty_reply(reason)
        if failure is not None:
            note(cost, tokens, error=failure.kind, detail=self._first_words(model, failure))
            return failure
        self._silence.end()
        note(cost, tokens)
        prompt_tokens, completion_tokens = tokens or (None, None)
        return Reply(text, model.name, prompt_tokens, completion_tokens, cost)

    async def _send(self, model: JudgeModel, prompt: _PendingPrompt, reply_format: Any) -> Any:
        extra = {} if reply_format is None else {"response_format": reply_format}
        return await self._router.acompletion(
            model=model.name,
            messages=prompt.messages,
            temperature=self._options.critic_temperature,
            max_tokens=prompt.max_reply_tokens,
            **extra,
            **NO_CALLBACKS,
        )

    def _thinking_cut(self, prompt: _PendingPrompt, tokens: tuple[int, int] | None) -> Failure:
        """Return the failure of a reply that reached its token limit in the judge's thoughts."""
        used = f" ({tokens[1]} used)" if tokens else ""
        raised = (
            f"--critic-thinking-tokens (now {self._options.critic_thinking_tokens}) or give --critic-max-tokens"
            if self._options.critic_max_tokens is None
            else f"--critic-max-tokens (now {self._options.critic_max_tokens})"
        )
        return Failure(
            kind="thinking_cut",
            may_be_billed=True,
            transient=False,  # it would think as long again
            detail=f"the reply ended in its thoughts at the limit of {prompt.max_reply_tokens} tokens{used}: raise "
            f"{raised}, or lower --critic-reasoning-effort",
        )

    def _note(
        self,
        model: JudgeModel,
        prompt: _PendingPrompt,
        started: float,
        cost: float | None,
        tokens: tuple[int, int] | None = None,
        *,
        error: str | None = None,
        detail: str | None = None,
    ) -> None:
        call = Call(
            **asdict(prompt.tag),
            model=model.name,
            attempt=prompt.attempts,
            prompt_tokens=tokens and tokens[0],
            completion_tokens=tokens and tokens[1],
            cost_usd=cost,
            latency_s=time.perf_counter() - started,
            error=error,
            detail=detail,
        )
        self._on_call(call)

    def _first_words(self, model: JudgeModel, failure: Failure) -> str | None:
        """Return the server's words on the first failure of a class, and show them; None for later ones."""
        if failure.kind in self._known_failures or not failure.detail or failure.refused == "key":
            return None
        self._known_failures.add(failure.kind)
        words = failure.detail[:MAX_DETAIL_CHARS]
        console.warn(f"first {failure.kind} of {model.name}: {words}")
        return words

    def _raise_if_silent(self, model: JudgeModel, failure: Failure) -> None:
        """Raise Stopped when no prompt has been answered for the time of the patience.

        A server that refuses a prompt for its text or length is not silent.
        """
        if failure.kind in ("bad_request", "context_window", "content_filter"):
            self._silence.end()
        if (seconds := self._silence.seconds) < self._patience:
            return
        words = f"{failure.kind}: {failure.detail}" if failure.detail else failure.kind
        raise Stopped(
            f"the critic's server at {model.endpoint} has given no verdict for {seconds:.0f} s ({words})",
            "change that setting and continue"
            if failure.kind in SETTINGS_ERRORS
            else "check the server, or raise --critic-timeout if it is slow, and run the same command again",
        )

    def _raise_if_fatal(self, model: JudgeModel, failure: Failure) -> None:
        """Raise a UserError for a failure that every other request would share."""
        if failure.refused == "credit":
            raise UserError(
                f"the critic's provider says that the credit for {model.name} is used up",
                "top it up and run the same command again; the scores so far are kept",
            )
        # A provider may refuse a single request in this way because of its text, or during an outage.
        if failure.refused in ("access", "model") and model.answered:
            return
        if failure.refused in ("key", "access"):  # without the provider's message, which may quote the key
            raise UserError(
                f"the critic's provider refuses the key for {model.name}", f"set {model.key_variable} to a valid key"
            )
        if failure.refused == "model":
            raise UserError(
                f"the critic's provider does not know {model.name} ({failure.detail})",
                "check --critic-model, --critic-fallback and --critic-api-base",
            )


def _usage(response: Any) -> tuple[int, int] | None:
    """Return the tokens of prompt and reply; None where the server gave no counts or impossible ones."""
    usage = getattr(response, "usage", None)
    prompt, completion = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    if not isinstance(prompt, int) or not isinstance(completion, int) or prompt < 1 or completion < 0:
        return None
    return prompt, completion


def _reply_text(response: Any) -> tuple[str, str | None]:
    """Return the reply's text, "" if there is none, and its finish reason."""
    choice = next(iter(getattr(response, "choices", None) or ()), None)
    content = getattr(getattr(choice, "message", None), "content", None)
    text = content if isinstance(content, str) and content.strip() else ""
    return text, getattr(choice, "finish_reason", None)


def _is_thinking(response: Any, text: str) -> bool:
    """Return True if a cut reply has thoughts and no whole verdict after them."""
    begun, _, verdict = text.partition("</think>")
    if text.lstrip().startswith("<think>"):
        return not verdict.strip()
    message = response.choices[0].message
    details = getattr(getattr(response, "usage", None), "completion_tokens_details", None)
    thoughts = getattr(message, "reasoning_content", None) or getattr(message, "thinking_blocks", None)
    thought = bool(thoughts or getattr(details, "reasoning_tokens", None) or verdict)
    # A verdict, or the code fence around it, would be closed.
    return thought and (verdict or begun).rstrip()[-1:] not in ("}", "`")


def _may_refuse_format(failure: Failure) -> bool:
    """Return True if a server may have failed because of ``response_format``."""
    named = re.search(r"response.?format|json.?schema|grammar|structured|guided", failure.detail, re.IGNORECASE)
    return failure.kind == "bad_request" or (failure.kind == "api_error" and named is not None)


def _empty_reply(reason: str | None) -> Failure:
    """Return the failure of a reply without text."""
    if reason == "content_filter":
        return Failure(kind="content_filter", may_be_billed=True, transient=False)
    # If thinking used up the token limit, it would do so again.
    return Failure(kind="empty_reply", may_be_billed=True, transient=reason != "length", detail=f"ended by {reason}")
