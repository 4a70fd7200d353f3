"""The llm critic: asks a model through litellm, once per response or once per step.

What one call gets wrong (an outage, a time limit, a reply that is no json after one repair) makes the scores that
it was asked for missing, with the class of the failure. What every call would get wrong (no key, a refused key, an
unknown model, an endpoint that never answered) ends the run. Replies that could be read whole are kept in a cache
and never paid for twice.
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
from ssrctl.critics.base import missing
from ssrctl.critics.llm.cache import CachedReply, ReplyCache, default_cache_dir
from ssrctl.critics.llm.client import CallFailed, CallTag, JudgeClient, Reply
from ssrctl.critics.llm.ledger import Call, Ledger
from ssrctl.critics.llm.meter import BudgetReached, Meter, find_prices
from ssrctl.critics.llm.pacing import Pacer
from ssrctl.critics.llm.prompt import repair_messages
from ssrctl.critics.llm.requests import Questions
from ssrctl.critics.llm.verdicts import Reading, Verdicts, read_verdicts
from ssrctl.errors import Stopped
from ssrctl.io.records import Rollout, StepScore

WINDOW = 2  # responses begun per call in flight: enough that no call waits for the reader of the results

Outcome = list[StepScore] | Exception


@dataclass
class Totals:
    """What the calls so far took; written by the loop's thread alone."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class LLMCritic:
    """See the module's text and ``Critic``.

    Args:
        options: the models, endpoint, rubric, limits and prices.
        ledger: file to note every call in; None notes nothing.

    Raises:
        UserError: litellm is not installed, the rubric is not found, no provider is known by a model's name, its key
            is not set, a budget is given without prices, or the cache cannot be opened.
    """

    def __init__(self, options: CriticOptions, *, ledger: Path | None = None) -> None:
        self.options = options
        self.questions = Questions(options)
        self.prices = find_prices(self.questions.models, options.input_price, options.output_price)
        self.meter = Meter(options.budget_usd, self.prices)
        self.totals = Totals()
        self.client = JudgeClient(options, Pacer(options.requests_per_minute), self.meter, self._note, schema=Verdicts)
        self.cache = ReplyCache(options.cache_dir or default_cache_dir()) if options.cache else None
        self.ledger = Ledger(ledger)
        self.identity: str | None = self.questions.identity
        self._slots = asyncio.Semaphore(options.max_concurrency)
        self._loop = _LoopThread()

    @property
    def repeat(self) -> int:
        """Number of the judgement: another one asks again for what was judged before, to measure the noise."""
        return self.questions.repeat

    @repeat.setter
    def repeat(self, number: int) -> None:
        self.questions.repeat = number

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """See ``Critic.stream``; at most ``WINDOW * max_concurrency`` responses are begun at a time."""
        source = iter(rollouts)
        begun: dict[Future[Outcome], Rollout] = {}
        finished: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        out_of_money: BudgetReached | None = None
        try:
            while True:
                while out_of_money is None and len(begun) < WINDOW * self.options.max_concurrency:
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
                    out_of_money = outcome
                elif isinstance(outcome, Exception):
                    raise outcome
                else:
                    yield rollout, outcome
        finally:
            for future in begun:
                future.cancel()
        if out_of_money is not None:
            raise Stopped(str(out_of_money), "raise --budget-usd and run the same command again") from None

    def summary(self) -> dict[str, Any]:
        """Calls, those answered from the cache, tokens, cost in US dollars (None without prices), failures."""
        totals = self.totals
        asked = max(totals.calls - totals.cached, 0)
        return {
            "calls": asked,
            "cached": totals.cached,
            "prompt_tokens": totals.prompt_tokens,
            "completion_tokens": totals.completion_tokens,
            "cost_usd": None if self.prices is None else float(self.meter.spent_usd),
            "mean_latency_s": totals.latency_s / asked if asked else None,
            "failed_calls_by_class": dict(totals.errors),
        }

    def close(self) -> None:
        """End the connections, the loop, the cache and the ledger."""
        self._loop.close(self.client.close())
        self.ledger.close()
        if self.cache is not None:
            self.cache.close()

    # ----------------------------------------------------------------------------------------------
    # in the loop's thread

    async def _outcome(self, rollout: Rollout) -> Outcome:
        """What becomes of a response. Errors are returned: of many tasks that fail alike, one is listened to."""
        try:
            return await self._judge(rollout)
        except Exception as error:
            return error

    async def _judge(self, rollout: Rollout) -> list[StepScore]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._scores(rollout, call)) for call in self.questions.calls(rollout)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [score for task in tasks for score in task.result()]

    async def _scores(self, rollout: Rollout, index: int | None) -> list[StepScore]:
        """The scores that one call is for."""
        wanted = self.questions.wanted(rollout, index)
        num_asked = len(rollout.steps or ()) if index is None else 1
        too_long = [missing("too_long")] * (num_asked - len(wanted))
        return (await self._wanted_scores(rollout, index, wanted) if wanted else []) + too_long

    async def _wanted_scores(
        self, rollout: Rollout, index: int | None, wanted: list[tuple[int, str]]
    ) -> list[StepScore]:
        keys = self.questions.keys(rollout, index)
        if (kept := self._kept(keys, wanted, rollout.id, index)) is not None:
            return kept
        try:
            async with self._slots:
                reply, reading = await self._ask(rollout, index, wanted)
        except CallFailed as failure:
            return [missing(failure.kind) for _ in wanted]
        if self.cache is not None and reading.problem is None:
            key = keys.get(reply.model, keys[self.questions.models[0]])
            await asyncio.to_thread(self.cache.put, key, _to_keep(reply))  # another process may hold the file
        return reading.scores

    async def _ask(self, rollout: Rollout, index: int | None, wanted: list[tuple[int, str]]) -> tuple[Reply, Reading]:
        """One call, and a second one if the reply cannot be read whole; the better of the two."""
        messages = self.questions.messages(rollout, index)
        most = self.questions.most_reply_tokens(len(wanted))
        tag = CallTag(id=rollout.id, step=index, kind="judge")
        reply = await self.client.ask(messages, max_reply_tokens=most, tag=tag)
        reading = read_verdicts(reply.text, wanted)
        if reading.problem is None:
            return reply, reading
        again = repair_messages(messages, reply.text, reading.problem)
        tag = CallTag(id=rollout.id, step=index, kind="repair")
        try:
            second = await self.client.ask(again, max_reply_tokens=most, tag=tag)
        except (CallFailed, BudgetReached):
            return reply, reading  # the scores of the first reply that could be read are paid for and true
        repaired = read_verdicts(second.text, wanted)
        return (second, repaired) if _num_scored(repaired) > _num_scored(reading) else (reply, reading)

    def _kept(
        self, keys: dict[str, str], wanted: list[tuple[int, str]], identity: str, index: int | None
    ) -> list[StepScore] | None:
        """The scores of a reply in the cache, the first model's before those of the fallbacks."""
        if self.cache is None:
            return None
        for model, key in keys.items():
            kept = self.cache.get(key)
            if kept is not None and (reading := read_verdicts(kept.text, wanted)).problem is None:
                self._note(Call(id=identity, step=index, kind="judge", model=model, cost_usd=0.0, cached=True))
                return reading.scores
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


def _to_keep(reply: Reply) -> CachedReply:
    return CachedReply(
        text=reply.text,
        model=reply.model,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        cost_usd=reply.cost_usd,
    )


def _num_scored(reading: Reading) -> int:
    return sum(score.reward is not None for score in reading.scores)


class _LoopThread:
    """An asyncio loop in a thread of its own, so that the caller may block, and Ctrl-C reaches the caller."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="llm-critic", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what runs, await ``last``, and end the thread; a second time does nothing."""
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
