"""A judge's client at a fault-injecting server, with every request, wait and cent of it in view."""

from __future__ import annotations

import asyncio

import pytest

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.client import CallTag, JudgeClient
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.meter import Meter, Prices
from ssrctl.critics.llm.pacing import Pacer

PRICES = Prices(1e-6, 2e-6)
MAX_REPLY = 100
KEY = "loopback-0123456789abcdef"  # not in a form by which a pattern could know it


class Bench:
    """A server, and a client of it whose waits are noted instead of waited."""

    def __init__(self, server, *, schema=None, budget=None, **settings):
        self.server, self.settings, self.schema = server, settings, schema
        self.calls, self.waits, self.pauses, self.now = [], [], [], 0.0
        self.meter = Meter(budget, PRICES)
        self.turns = 0

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def make(self):
        options = {"critic_model": "openai/judge", "critic_api_base": self.server.base_url, "critic_timeout": 30.0}
        pacer = Pacer(None, clock=lambda: self.now, sleep=self.sleep)
        wait = pacer.wait

        async def counted():
            self.turns += 1
            await wait()

        pacer.wait, pacer.pause = counted, self.pauses.append
        return JudgeClient(
            CriticOptions(critic="llm", **options | self.settings),
            pacer,
            self.meter,
            self.calls.append,
            schema=self.schema,
            sleep=self.sleep,
            clock=lambda: self.now,
        )

    def run(self, work):
        """The result of ``work(client)`` in a loop of its own."""

        async def main():
            client = self.make()
            try:
                return await work(client)
            finally:
                await client.close()

        try:
            return asyncio.run(main())
        finally:
            assert self.meter.reserved_usd == 0
            assert len(self.calls) <= self.turns

    def ask(self, text="foo"):
        return self.run(lambda client: question(client, text))


def question(client, text="foo"):
    messages = [{"role": "system", "content": "You grade."}, {"role": "user", "content": text}]
    return client.ask(messages, max_reply_tokens=MAX_REPLY, tag=CallTag("q/0", 3, "repair"))


def echo(messages):
    """Grades nothing, repeats the question."""
    return messages[-1]["content"]


def failing(server, **times):
    """Let each request meet these faults in turn, each so many times, then none."""
    faults = [kind for kind, count in times.items() for _ in range(count)]
    server.fault_of = lambda body, attempt: faults[attempt] if attempt < len(faults) else None


def outcome(bench, text="foo"):
    with pytest.raises(CallFailed) as raised:
        bench.ask(text)
    # Nothing of litellm's hangs on it: its errors quote requests.
    assert raised.value.__cause__ is None and raised.value.__context__ is None
    return raised.value
