"""The llm critic: asks a model through litellm, once per response or once per step.

A failure of one call (an outage, a timeout, a reply that is not json even after one repair) makes the scores that
the call was for missing, with the class of the failure. A failure that every call would share (no key, a refused key,
an unknown model, an endpoint that never answered) ends the run. Replies that could be read whole are cached and never
paid for twice.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssrctl.configs import CriticOptions
from ssrctl.critics.base import CriticResources, missing
from ssrctl.critics.llm.cache import Reply, ReplyCache, default_cache_dir
from ssrctl.critics.llm.client import CallTag, JudgeClient
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.ledger import Call, Ledger
from ssrctl.critics.llm.meter import BudgetReached, Meter
from ssrctl.critics.llm.pacing import Pacer
from ssrctl.critics.llm.prices import find_prices
from ssrctl.critics.llm.prompt import repair_messages
from ssrctl.critics.llm.requests import JudgeRequests
from ssrctl.critics.llm.verdicts import ParsedReply, Verdicts, parse_verdicts
from ssrctl.errors import Stopped
from ssrctl.io.records import Rollout, StepScore

WINDOW = 2  # responses begun per call in flight: enough that no call waits for the reader of the results

Outcome = list[StepScore] | Exception


@dataclass
class CallTotals:
    """Sums over the calls so far; written only by the loop's thread."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class LLMCritic:
    """The critic that the module's docstring describes; see ``Critic``.

    Args:
        options: the models, endpoint, rubric, limits and prices.
        ledger: file for the log of every call; None writes no log.

    Raises:
        UserError: litellm is not installed, the rubric is not found, a model's provider is unknown or its key is not
            set, a budget is given without prices, or the cache cannot be opened.
    """

    def __init__(self, options: CriticOptions, *, ledger: Path | None = None) -> None:
        self.options = options
        self.requests = JudgeRequests(options)
        self.prices = find_prices(self.requests.models, options.critic_input_price, options.critic_output_price)
        self.meter = Meter(options.critic_budget_usd, self.prices)
        self.totals = CallTotals()
        self.client = JudgeClient(
            options, Pacer(options.critic_requests_per_minute), self.meter, self._note, schema=Verdicts
        )
        self.cache = ReplyCache(options.critic_cache_dir or default_cache_dir()) if options.critic_cache else None
        self.ledger = Ledger(ledger)
        self.identity: str | None = self.requests.identity
        self._slots = asyncio.Semaphore(options.critic_max_concurrency)
        self._loop = _LoopThread()

    @classmethod
    def create(cls, options: CriticOptions, resources: CriticResources) -> LLMCritic:
        """Return the critic with the ledger of ``resources``."""
        return cls(options, ledger=resources.ledger)

    @property
    def repeat(self) -> int:
        """Number of the judgement: another one judges the same steps again, to measure the noise."""
        return self.requests.repeat

    @repeat.setter
    def repeat(self, number: int) -> None:
        self.requests.repeat = number

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield rollouts with scores, see ``Critic.stream``.

        At most ``WINDOW * critic_max_concurrency`` responses are in work at a time.
        """
        source = iter(rollouts)
        begun: dict[Future[Outcome], Rollout] = {}
        finished: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        budget_reached: BudgetReached | None = None
        try:
            while True:
                while budget_reached is None and len(begun) < WINDOW * self.options.critic_max_concurrency:
                    rollout = next(source, None)
                    if rollout is None:
                        break
                    future = self._loop.submit(self._outcome(rollout))
                    begun[future] = rollout
                    future.add_done_callback(finished.put)
                if not begun:
                    break
                future = finished.get()
                rollout = begun.pop(future)
                outcome = future.result()
                if isinstance(outcome, BudgetReached):
                    budget_reached = outcome
                elif isinstance(outcome, Exception):
                    while not finished.empty():  # scores that were paid for
                        done = finished.get()
                        if isinstance(scores := done.result(), list):
                            yield begun.pop(done), scores
                    raise outcome
                else:
                    yield rollout, outcome
        finally:
            for future in begun:
                future.cancel()
        if budget_reached is not None:
            raise Stopped(str(budget_reached), "raise --critic-budget-usd and run the same command again") from None

    def summary(self) -> dict[str, Any]:
        """Return calls, cached replies, tokens, cost in US dollars (None without prices) and failures so far."""
        totals = self.totals
        asked = max(totals.calls - totals.cached, 0)
        return {
            "calls": asked,
            "cached": totals.cached,
            "prompt_tokens": totals.prompt_tokens,
            "completion_tokens": totals.completion_tokens,
            "cost_usd": None if self.prices is None else self.meter.spent_usd,
            "mean_latency_s": totals.latency_s / asked if asked else None,
            "failed_calls_by_class": dict(totals.errors),
        }

    def close(self) -> None:
        """Close the connections, the loop, the cache and the ledger."""
        self._loop.close(self.client.close())
        self.ledger.close()
        if self.cache is not None:
            self.cache.close()

    # ----------------------------------------------------------------------------------------------
    # in the loop's thread

    async def _outcome(self, rollout: Rollout) -> Outcome:
        """Return the scores of a response, or its error: of many tasks that fail alike, the reader raises one."""
        try:
            return await self._judge(rollout)
        except Exception as error:
            return error

    async def _judge(self, rollout: Rollout) -> list[StepScore]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._scores(rollout, index)) for index in self.requests.of(rollout)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [score for task in tasks for score in task.result()]

    async def _scores(self, rollout: Rollout, index: int | None) -> list[StepScore]:
        """Return the scores that one request is for."""
        wanted = self.requests.wanted(rollout, index)
        num_steps = len(rollout.steps or ()) if index is None else 1
        too_long = [missing("too_long")] * (num_steps - len(wanted))
        return (await self._wanted_scores(rollout, index, wanted) if wanted else []) + too_long

    async def _wanted_scores(
        self, rollout: Rollout, index: int | None, wanted: list[tuple[int, str]]
    ) -> list[StepScore]:
        keys = self.requests.cache_keys(rollout, index)
        if (cached := self._cached(keys, wanted, rollout.id, index)) is not None:
            return cached
        try:
            async with self._slots:
                reply, parsed = await self._ask(rollout, index, wanted)
        except CallFailed as failure:
            return [missing(failure.kind) for _ in wanted]
        if self.cache is not None and parsed.problem is None:
            key = keys.get(reply.model, keys[self.requests.models[0]])
            await asyncio.to_thread(self.cache.put, key, reply)  # another process may lock the file
        return parsed.scores

    async def _ask(
        self, rollout: Rollout, index: int | None, wanted: list[tuple[int, str]]
    ) -> tuple[Reply, ParsedReply]:
        """Ask once, and once more if the reply cannot be read whole; return the better of the two replies."""
        messages = self.requests.messages(rollout, index)
        limit = self.requests.max_reply_tokens(len(wanted))
        tag = CallTag(id=rollout.id, step=index, kind="judge")
        reply = await self.client.ask(messages, max_reply_tokens=limit, tag=tag)
        parsed = parse_verdicts(reply.text, wanted)
        if parsed.problem is None:
            return reply, parsed
        again = repair_messages(messages, reply.text, parsed.problem)
        tag = CallTag(id=rollout.id, step=index, kind="repair")
        try:
            second = await self.client.ask(again, max_reply_tokens=limit, tag=tag)
        except (CallFailed, BudgetReached):
            return reply, parsed  # the readable scores of the first reply are paid for and valid
        repaired = parse_verdicts(second.text, wanted)
        return (second, repaired) if repaired.num_scored > parsed.num_scored else (reply, parsed)

    def _cached(
        self, keys: dict[str, str], wanted: list[tuple[int, str]], rollout_id: str, index: int | None
    ) -> list[StepScore] | None:
        """Return the scores of a cached reply; the first model's goes before those of the fallbacks."""
        if self.cache is None:
            return None
        for model, key in keys.items():
            cached = self.cache.get(key)
            if cached is not None and (parsed := parse_verdicts(cached.text, wanted)).problem is None:
                self._note(Call(id=rollout_id, step=index, kind="judge", model=model, cost_usd=0.0, cached=True))
                return parsed.scores
        return None

    def _note(self, call: Call) -> None:
        totals = self.totals
        totals.calls += 1
        totals.cached += call.cached
        totals.prompt_tokens += call.prompt_tokens or 0
        totals.completion_tokens += call.completion_tokens or 0
        totals.latency_s += call.latency_s or 0.0
        if call.error is not None:
            totals.errors[call.error] += 1
        self.ledger.note(call)


class _LoopThread:
    """An asyncio loop in its own thread, so that the caller may block and Ctrl-C reaches the caller."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="llm-critic", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel all tasks, await ``last`` and end the thread; a second call does nothing."""
        if self.loop.is_closed():
            last.close()
            return
        self.submit(self._end(last)).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end(self, last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last
