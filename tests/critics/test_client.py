"""The judge's client against a loopback server that fails as told: every request is paced, paid for and noted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import subprocess
import sys
import traceback
from collections import Counter

import pytest
from aiohttp import web
from critics.fault_server import FAULTS, FaultServer, completion, failure

from ssrctl.configs import CriticOptions
from ssrctl.critics.failures import CallFailed
from ssrctl.critics.meter import BudgetReached, Meter, Prices
from ssrctl.critics.pacing import Pacer
from ssrctl.critics.verdicts import Verdicts
from ssrctl.errors import UserError

pytest.importorskip("litellm")

from ssrctl.critics import client as module  # after the check: needs litellm's dependencies
from ssrctl.critics.client import CallTag, JudgeClient

KEY = "loopback-0123456789abcdef"  # not in a form by which a pattern could know it
PRICES = Prices(1e-6, 2e-6)
MAX_REPLY = 100


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


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


@pytest.fixture
def server():
    with FaultServer(grade=echo, stall_seconds=20) as made:
        yield made


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


# -- what is sent and noted ----------------------------------------------------------------------------------------


def test_a_question_and_its_answer(server):
    bench = Bench(server, critic_temperature=0.3)
    reply = bench.ask("What is 2+2?")
    assert (reply.text, reply.model, reply.finish_reason) == ("What is 2+2?", "openai/judge", "stop")
    (request,), (call,) = server.requests, bench.calls
    assert request.body == {
        "model": "judge",
        "messages": [{"role": "system", "content": "You grade."}, {"role": "user", "content": "What is 2+2?"}],
        "temperature": 0.3,
        "max_tokens": MAX_REPLY,
    }
    assert request.authorization == f"Bearer {KEY}"
    assert (call.id, call.step, call.kind, call.model, call.attempt) == ("q/0", 3, "repair", "openai/judge", 1)
    assert (call.prompt_tokens, call.completion_tokens, call.error, call.cached) == (9, 4, None, False)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.latency_s) == (9, 4, call.latency_s)
    assert call.cost_usd == reply.cost_usd == bench.meter.spent_usd == pytest.approx(9 * 1e-6 + 4 * 2e-6)
    assert bench.waits == []


def test_lone_surrogates_can_be_asked_about(server):
    assert Bench(server).ask("a\ud800b").text == "a?b"


def test_a_reply_without_a_token_count_costs_what_was_reserved(server, monkeypatch):
    async def uncounted(server, http, body):
        return web.json_response({**completion(body, "fine"), "usage": None})

    monkeypatch.setitem(FAULTS, "uncounted", uncounted)
    server.faults = {"uncounted": 1.0}
    bench = Bench(server)
    reply = bench.ask()
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("fine", None, None)
    assert reply.cost_usd == bench.meter.unconfirmed_usd == bench.meter.spent_usd > MAX_REPLY * 2e-6


# -- failures ------------------------------------------------------------------------------------------------------

# kind of fault: class, how often it is asked with one retry, whether it may have been billed without a count
MATRIX = {
    "error_500": ("api_error", 2, False),
    "closed_socket": ("connection", 2, True),
    "cut_body": ("connection", 2, True),
    "truncated_json": ("api_error", 2, True),
    "wrong_type": ("api_error", 2, True),
    "no_choices": ("empty_reply", 2, None),
    "empty_reply": ("empty_reply", 2, None),
    "null_reply": ("empty_reply", 2, None),
    "context_window": ("context_window", 1, False),
    "content_filter": ("content_filter", 1, None),
}


@pytest.mark.parametrize("fault", MATRIX)
def test_failures_have_their_class_and_price(server, fault):
    kind, requests, lost = MATRIX[fault]
    server.faults = {fault: 1.0}
    bench = Bench(server, critic_retries=1)
    failed = outcome(bench)
    assert failed.kind == kind
    assert failed.may_be_billed == (lost is not False)
    assert len(bench.calls) == bench.turns == server.counts[fault] == requests
    assert [call.attempt for call in bench.calls] == list(range(1, requests + 1))
    assert {call.error for call in bench.calls} == {kind}
    assert sum(call.cost_usd for call in bench.calls) == pytest.approx(bench.meter.spent_usd)
    assert (bench.meter.unconfirmed_usd > 0) == bool(lost)
    assert (bench.meter.spent_usd > 0) == (lost is not False)
    assert KEY not in str(failed)


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_time_limit(server, fault):
    Bench(server).ask()  # litellm imports more in its first call than the time limit below allows
    server.faults = {fault: 1.0}
    bench = Bench(server, critic_retries=1, critic_timeout=0.3)
    failed = outcome(bench)
    assert (failed.kind, failed.may_be_billed, len(bench.calls)) == ("timeout", True, 2)
    assert bench.meter.unconfirmed_usd == bench.meter.spent_usd > 0


@pytest.mark.parametrize(
    ("status", "kind", "requests", "billed"),
    [
        (400, "bad_request", 1, False),
        (408, "timeout", 2, True),
        (409, "api_error", 2, False),
        (413, "context_window", 1, False),
        (422, "bad_request", 1, False),
        (503, "api_error", 2, False),
        (504, "timeout", 2, True),
        (529, "api_error", 2, False),
    ],
)
def test_statuses(server, monkeypatch, status, kind, requests, billed):
    async def refuse(server, http, body):
        return failure(status, "not now")

    monkeypatch.setitem(FAULTS, "refuse", refuse)
    server.faults = {"refuse": 1.0}
    bench = Bench(server, critic_retries=1)
    failed = outcome(bench)
    assert (failed.kind, failed.may_be_billed) == (kind, billed)
    assert failed.detail == f"status {status}: not now"
    assert len(bench.calls) == len(server.requests) == requests


def test_a_passing_failure_is_waited_out_with_growing_waits(server):
    failing(server, error_500=2, closed_socket=1)
    bench = Bench(server)
    reply = bench.ask()
    assert reply.text == "foo"
    assert [call.error for call in bench.calls] == ["api_error", "api_error", "connection", None]
    assert [call.attempt for call in bench.calls] == [1, 2, 3, 4]
    assert len(bench.waits) == 3
    for number, wait in enumerate(bench.waits):
        assert 2**number / 2 <= wait <= 2**number
    assert bench.waits != [0.5, 1, 2] and bench.waits != [1, 2, 4]  # drawn, lest all tasks come back at once


def test_retries_are_as_many_as_wanted(server):
    failing(server, error_500=1)
    assert outcome(Bench(server, critic_retries=0)).kind == "api_error"
    assert len(server.requests) == 1


# -- rate limits ---------------------------------------------------------------------------------------------------


def test_a_server_that_asks_to_slow_down_is_left_alone_and_uses_up_no_try(server):
    server.retry_after = 7
    failing(server, rate_limit=4)
    bench = Bench(server, critic_retries=0)
    assert bench.ask().text == "foo"
    assert [call.error for call in bench.calls] == ["rate_limit"] * 4 + [None]
    assert all(wait >= 7 for wait in bench.waits) and bench.meter.unconfirmed_usd == 0
    assert bench.pauses == [7] * 4  # for all other questions, too


def test_rate_limits_end_somewhere(server):
    server.retry_after = None
    server.faults = {"rate_limit": 1.0}
    bench = Bench(server)
    failed = outcome(bench)
    assert (failed.kind, failed.may_be_billed) == ("rate_limit", False)
    assert 0.8 * module.PATIENCE_S < sum(bench.waits) <= module.PATIENCE_S
    assert max(bench.waits) <= module.MAX_WAIT_S


def test_a_server_that_wants_an_hour_is_not_waited_for(server):
    server.retry_after = 3600
    server.faults = {"rate_limit": 1.0}
    bench = Bench(server)
    assert outcome(bench).kind == "rate_limit"
    assert len(server.requests) == 1 and bench.waits == bench.pauses == []


# -- fallbacks -----------------------------------------------------------------------------------------------------

FALLBACK = {"critic_fallback": ["openai/second"], "critic_retries": 1}


def only_first(fault):
    return lambda body, attempt: fault if body["model"] == "judge" else None


def test_the_fallback_answers_when_the_first_model_fails(server):
    server.fault_of = only_first("error_500")
    bench = Bench(server, **FALLBACK)
    assert bench.ask().model == "openai/second"
    assert [(call.model, call.attempt, call.error) for call in bench.calls] == [
        ("openai/judge", 1, "api_error"),
        ("openai/judge", 2, "api_error"),
        ("openai/second", 3, None),
    ]


def test_what_will_not_pass_goes_to_the_fallback_at_once(server):
    server.fault_of = only_first("context_window")
    bench = Bench(server, **FALLBACK)
    assert bench.ask().model == "openai/second"
    assert len(bench.calls) == 2 and bench.waits == []


def test_a_rate_limit_counts_as_a_try_where_there_is_a_fallback(server):
    server.retry_after = 1
    server.fault_of = only_first("rate_limit")
    bench = Bench(server, **FALLBACK)
    assert bench.ask().model == "openai/second"
    assert [call.error for call in bench.calls] == ["rate_limit", "rate_limit", None]


def test_a_long_pause_is_left_to_the_fallback_and_kept(server):
    server.retry_after = 100
    server.fault_of = only_first("rate_limit")
    bench = Bench(server, **FALLBACK)

    async def two(client):
        for text in ("a", "b"):
            assert (await question(client, text)).model == "openai/second"
        server.fault_of = lambda body, attempt: None
        bench.now += 101
        assert (await question(client, "c")).model == "openai/judge"

    bench.run(two)
    assert bench.pauses == []  # that would hold back the fallback as well
    assert [call.model[7:] for call in bench.calls] == ["judge", "second", "second", "judge"]


def test_a_model_that_fails_again_and_again_is_rested(server):
    server.fault_of = only_first("error_500")
    bench = Bench(server, critic_fallback=["openai/second"], critic_retries=0)

    async def many(client):
        for number in range(6):
            await question(client, str(number))
        bench.now += module.REST_S + 1
        await question(client, "later")

    bench.run(many)
    asked = Counter(request.body["model"] for request in server.requests)
    assert asked == {"judge": module.REST_AFTER + 1, "second": 7}


def test_when_all_fail_the_last_failure_counts(server):
    server.fault_of = lambda body, attempt: "closed_socket" if body["model"] == "judge" else "context_window"
    failed = outcome(Bench(server, **FALLBACK))
    assert (failed.kind, failed.may_be_billed) == ("context_window", True)


def test_the_endpoint_is_for_models_of_the_first_ones_provider_alone(server, monkeypatch):
    from ssrctl.critics.judge_models import prepare_models

    monkeypatch.setenv("ANTHROPIC_API_KEY", "other-0123456789")
    fallback = ["openai/second", "anthropic/claude-sonnet-4-5", "openai/judge"]
    options = CriticOptions(
        critic="llm", critic_model="openai/judge", critic_fallback=fallback, critic_api_base="http://own/v1"
    )
    models = prepare_models(options, None)
    assert [model.parameters.get("api_base") for model in models] == ["http://own/v1"] * 2 + [None]
    assert [model.place for model in models] == ["http://own/v1"] * 2 + ["anthropic"]
    assert [model.keys for model in models] == ["OPENAI_API_KEY"] * 2 + ["ANTHROPIC_API_KEY"]


# -- keys ----------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_error_and_no_log_even_when_the_server_quotes_it(server, caplog, capfd):
    import litellm

    loggers = [logging.getLogger(name) for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    server.faults = {"error_500": 1.0}
    told = []
    try:
        litellm._turn_on_debug()
        with caplog.at_level(logging.DEBUG):
            told.append(outcome(Bench(server, critic_retries=1)))
            server.faults, server.key = {}, "another key"
            with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
                Bench(server).ask()
            told.append(raised.value)
    finally:
        litellm.set_verbose = False
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
    assert told[0].detail.endswith("a request with Bearer ***") or told[0].detail.endswith("a request with ***")
    assert server.requests[-1].authorization == f"Bearer {KEY}"
    shown = "".join(capfd.readouterr()) + caplog.text + repr(told)
    for error in told:
        shown += "".join(traceback.format_exception(error)) + repr(error.__dict__)
        assert error.__context__ is None and error.__cause__ is None
    assert KEY not in shown


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        Bench(server, critic_api_base=None).ask()
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(UserError, match="set ANTHROPIC_API_KEY"):
        Bench(server, critic_fallback=["anthropic/claude-sonnet-4-5"]).ask()
    assert Bench(server).ask().text == "foo"  # an endpoint of one's own needs none
    assert [request.authorization for request in server.requests] == ["Bearer none"]


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}", "loopback\u2026key"])
def test_what_cannot_be_a_key_is_refused_before_it_is_sent(server, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(UserError, match="OPENAI_API_KEY cannot be a key") as raised:
        Bench(server).ask()
    assert value.strip() not in str(raised.value) and not server.requests


# -- what every question would meet --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, "refuses the key for openai/judge .set OPENAI_API_KEY"),
        (403, None, "refuses the key for openai/judge"),
        (404, None, "does not know openai/judge"),
        (402, None, "credit for openai/judge is used up"),
        (429, "insufficient_quota", "credit for openai/judge is used up"),
    ],
)
def test_what_every_question_would_meet_ends_the_run(server, monkeypatch, status, code, message):
    async def refuse(server, http, body):
        return failure(status, "no", code=code)

    monkeypatch.setitem(FAULTS, "refuse", refuse)
    server.faults = {"refuse": 1.0}
    bench = Bench(server)
    with pytest.raises(UserError, match=message):
        bench.ask()
    assert len(bench.calls) == 1 and bench.meter.spent_usd == 0

    async def later(client):
        server.fault_of = lambda body, attempt: None
        await question(client)
        del server.fault_of
        await question(client, "another")

    # A model that has answered is known, and so is what its key may do: this question alone is refused.
    with pytest.raises(CallFailed if status in (403, 404) else UserError):
        Bench(server).run(later)


def test_a_server_that_turns_every_question_down_ends_the_run(server, monkeypatch):
    async def refuse(server, http, body):
        return failure(400, "max_tokens is too large")

    monkeypatch.setitem(FAULTS, "refuse", refuse)

    async def work(client):
        for number in range(module.TURNED_DOWN - 1):
            with pytest.raises(CallFailed, match="bad_request"):
                await question(client, f"bad {number}")
        await question(client, "one more")

    server.faults = {"refuse": 1.0}
    with pytest.raises(UserError, match=r"every question to openai/judge .status 400: max_tokens is too large"):
        Bench(server).run(work)
    # One answer shows that it is the questions that are bad.
    server.fault_of = lambda body, attempt: "refuse" if "bad" in str(body["messages"]) else None

    async def answered(client):
        await question(client)
        await work(client)
        with pytest.raises(CallFailed, match="bad_request"):
            await question(client, "bad again")

    Bench(server).run(answered)


def test_a_server_that_never_answered_ends_the_run(server, monkeypatch):
    bench = Bench(server, critic_api_base="http://127.0.0.1:9/v1", critic_retries=1)
    with pytest.raises(UserError, match=r"no connection to the critic's server at http://127\.0\.0\.1:9/v1 "):
        bench.ask()
    assert [call.error for call in bench.calls] == ["connection"] * 2
    assert bench.meter.spent_usd == 0 and len(bench.waits) == 1


def test_a_server_that_goes_away_is_a_failed_call():
    with contextlib.ExitStack() as stack:
        bench = Bench(stack.enter_context(FaultServer(grade=echo)), critic_retries=1)

        async def two(client):
            await question(client)
            await asyncio.to_thread(stack.close)
            with pytest.raises(CallFailed, match="connection"):
                await question(client)

        bench.run(two)
    assert [call.error for call in bench.calls] == [None, "connection", "connection"]


@pytest.mark.parametrize(
    "place", ["localhost:8000/v1", "ftp://own/v1", "http://me:secret@own/v1", "http://", "http://[x"]
)
def test_an_endpoint_that_cannot_be_asked_is_refused(server, place):
    with pytest.raises(UserError, match="--critic-api-base") as raised:
        Bench(server, critic_api_base=place).ask()
    assert "secret" not in str(raised.value)


def test_a_model_without_a_provider_is_refused(server):
    with pytest.raises(UserError, match="no-provider-here") as raised:
        Bench(server, critic_model="no-provider-here").ask()
    assert raised.value.__context__ is None


# -- the form of replies -------------------------------------------------------------------------------------------


def forms(server):
    """Type of each request's response_format."""
    return [request.body.get("response_format", {}).get("type") for request in server.requests]


@pytest.mark.parametrize(
    ("model", "form"), [("openai/gpt-4o", "json_schema"), ("openai/gpt-4-turbo", None), ("openai/judge", None)]
)
def test_models_that_can_be_bound_to_the_schema_are(server, model, form):
    bench = Bench(server, schema=Verdicts, critic_model=model)
    supported = []

    async def work(client):
        supported.append(client.supports_schema)
        await question(client)

    bench.run(work)
    assert supported == [form == "json_schema"] and forms(server) == [form]
    if form:
        sent = server.requests[0].body["response_format"]["json_schema"]["schema"]
        assert sent["properties"].keys() == Verdicts.model_fields.keys()


def test_json_is_asked_for_at_a_provider_that_is_known_to_give_it(server):
    from ssrctl.critics.judge_models import prepare_models

    def form(model, **settings):
        options = CriticOptions(critic="llm", critic_model=model, **settings)
        return prepare_models(options, Verdicts)[0].reply_format

    assert form("openai/gpt-4-turbo") == {"type": "json_object"}
    assert form("openai/gpt-4-turbo", critic_api_base="http://own/v1") is None
    assert form("openai/no-such-model") is None
    assert form("openai/gpt-4o", critic_api_base="http://own/v1") is Verdicts


def no_forms(status):
    async def refuse(server, http, body):
        if "response_format" in body:
            return failure(status, "what is a response_format?")
        return web.json_response(completion(body, "plain"))

    return refuse


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_the_schema_is_asked_without_and_never_with_it_again(server, monkeypatch, status):
    monkeypatch.setitem(FAULTS, "no_forms", no_forms(status))
    server.faults = {"no_forms": 1.0}
    bench = Bench(server, schema=Verdicts, critic_model="openai/gpt-4o", critic_retries=0)

    async def work(client):
        # Together: both are under way with the schema before the first refusal.
        replies = await asyncio.gather(question(client, "a"), question(client, "b"))
        replies.append(await question(client, "c"))
        assert [reply.text for reply in replies] == ["plain"] * 3 and not client.supports_schema

    bench.run(work)
    assert Counter(forms(server)) == {"json_schema": 2, None: 3} and forms(server)[-1] is None
    assert Counter(call.error for call in bench.calls) == {"bad_request": 2, None: 3}


def test_another_bad_request_does_not_cost_the_schema(server, monkeypatch):
    async def refuse(server, http, body):
        return failure(400, "temperature?")

    monkeypatch.setitem(FAULTS, "refuse", refuse)
    server.fault_of = lambda body, attempt: "refuse" if "bad" in str(body["messages"]) else None
    bench = Bench(server, schema=Verdicts, critic_model="openai/gpt-4o")

    async def work(client):
        for text, requests in (("bad one", 2), ("good", 1), ("bad two", 1)):
            before = len(server.requests)
            with contextlib.suppress(CallFailed):
                await question(client, text)
            assert client.supports_schema and len(server.requests) == before + requests

    bench.run(work)
    assert forms(server) == ["json_schema", None, "json_schema", "json_schema"]


# -- money and cancellation ----------------------------------------------------------------------------------------


def test_a_budget_ends_the_tries_before_it_is_overrun(server):
    server.faults = {"truncated_json": 1.0}  # each may have been billed in full
    reserved = 1e-4 + 2e-6 * MAX_REPLY  # a little more than one try
    bench = Bench(server, budget=2.5 * reserved, critic_retries=9)
    with pytest.raises(BudgetReached):
        bench.ask()
    assert 2 <= len(server.requests) == len(bench.calls) < 10
    assert bench.meter.spent_usd <= 2.5 * reserved


def test_a_question_cancelled_in_flight_may_have_been_billed(server):
    server.faults = {"stall": 1.0}
    bench = Bench(server)

    async def work(client):
        task = asyncio.create_task(question(client))
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bench.run(work)
    (call,) = bench.calls
    assert call.error == "interrupted" and call.cost_usd == bench.meter.unconfirmed_usd > 0


def test_a_question_cancelled_before_it_was_sent_costs_nothing(server):
    bench = Bench(server)

    async def forever():
        await asyncio.Event().wait()

    async def work(client):
        client._pacer.wait = forever
        task = asyncio.create_task(question(client))
        while not bench.meter.reserved_usd:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bench.run(work)
    assert bench.meter.spent_usd == 0 and not bench.calls and not server.requests


# -- many at once --------------------------------------------------------------------------------------------------

MIX = ["error_500", "rate_limit", "closed_socket", "cut_body", "truncated_json", "empty_reply", "context_window"]
KINDS = {
    "error_500": "api_error",
    "rate_limit": "rate_limit",
    "closed_socket": "connection",
    "cut_body": "connection",
    "truncated_json": "api_error",
    "empty_reply": "empty_reply",
    "context_window": "context_window",
}


def fate(server, text, retries):
    """What becomes of a question by the client's rules, worked out from the server's choice of faults: its answer or
    its class of failure, and how many requests it takes."""
    body = {
        "model": "judge",
        "messages": [{"role": "system", "content": "You grade."}, {"role": "user", "content": text}],
    }
    attempt = 0
    while True:
        fault = server.fault_of(body, attempt)
        attempt += 1
        if fault is None:
            return text, attempt
        retries -= fault != "rate_limit"
        if fault == "context_window" or retries < 0:
            return KINDS[fault], attempt


def test_hundreds_at_once_end_as_the_faults_have_it(server):
    server.faults = dict.fromkeys(MIX, 0.6 / len(MIX))
    server.seed, server.retry_after = 7, 0.5
    bench = Bench(server, critic_retries=2)
    texts = [f"question {number}" for number in range(120)]
    random.Random(0).shuffle(texts)

    async def work(client):
        gate = asyncio.Semaphore(32)

        async def one(text):
            async with gate:
                try:
                    return (await question(client, text)).text
                except CallFailed as failed:
                    return failed.kind

        return await asyncio.gather(*map(one, texts))

    found = dict(zip(texts, bench.run(work), strict=True))
    fates = {text: fate(server, text, 2) for text in texts}
    assert found == {text: end for text, (end, _) in fates.items()}
    assert set(KINDS.values()) - {"rate_limit"} <= set(found.values())  # the mix had every outcome
    # Every request of the server's is one call in the ledger and one turn of the pacer.
    assert sum(server.counts.values()) == len(bench.calls) == bench.turns == sum(n for _, n in fates.values())
    assert Counter(call.error for call in bench.calls) == Counter(
        {KINDS.get(fault): 0 for fault in server.counts}
    ) + Counter(KINDS.get(fault) for fault in server.counts.elements())
    assert sum(call.cost_usd for call in bench.calls) == pytest.approx(bench.meter.spent_usd)


def test_a_loop_that_closed_one_client_can_have_another(server):
    bench = Bench(server)

    async def main():
        for _ in range(2):
            client = bench.make()
            assert (await question(client)).text == "foo"
            await client.close()

    asyncio.run(main())
    assert len(server.requests) == 2


CLEAN_EXIT = """
import asyncio, gc, sys, threading
from ssrctl.configs import CriticOptions
from ssrctl.critics.client import CallTag, JudgeClient
from ssrctl.critics.failures import CallFailed
from ssrctl.critics.meter import Meter
from ssrctl.critics.pacing import Pacer

async def work():
    options = CriticOptions(critic="llm", critic_model="openai/judge", critic_api_base=sys.argv[1], critic_retries=1)
    async def no_wait(seconds): pass
    client = JudgeClient(options, Pacer(None), Meter(None, None), lambda call: None, sleep=no_wait)
    async def one(number):
        try:
            messages = [{"role": "user", "content": str(number)}]
            await client.ask(messages, max_reply_tokens=9, tag=CallTag("a"))
        except CallFailed:
            pass
    await asyncio.gather(*map(one, range(40)))
    await client.close()

def run():
    loop = asyncio.new_event_loop()
    loop.set_debug(False)  # it would report slow imports
    loop.run_until_complete(work())
    loop.run_until_complete(loop.shutdown_default_executor())
    left = [task for task in asyncio.all_tasks(loop) if not task.done()]
    loop.close()
    assert not left, left

thread = threading.Thread(target=run)
thread.start(); thread.join()
gc.collect()
assert threading.active_count() == 1, threading.enumerate()
"""


@pytest.mark.slow
def test_nothing_is_left_open_and_nothing_printed(server):
    server.grade = lambda messages: "fine"
    server.faults = {"error_500": 0.2, "closed_socket": 0.2}
    # -X dev: warnings of sockets and sessions left open, and of tasks never awaited.
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", CLEAN_EXIT, server.base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
