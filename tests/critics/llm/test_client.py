"""The judge's client against a server that fails as told: every request is paced, paid for and noted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("litellm")  # and what comes with it

from aiohttp import web
from critics.llm.client_bench import KEY, MAX_REPLY, Bench, echo, failing, outcome, question
from critics.llm.fault_server import FAULTS, FaultServer, completion, failure

from ssrctl.critics.llm import client as module
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.meter import BudgetReached
from ssrctl.errors import Stopped


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server():
    with FaultServer(grade=echo, stall_seconds=20) as made:
        yield made


# -- what is sent and noted ------------------------------------------------------------------------------------------


def test_a_question_and_its_answer(server):
    bench = Bench(server, critic_temperature=0.3)
    reply = bench.ask("What is 2+2?")
    assert (reply.text, reply.model) == ("What is 2+2?", "openai/judge")
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
    assert (reply.prompt_tokens, reply.completion_tokens) == (9, 4) and call.latency_s > 0
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


# -- failures --------------------------------------------------------------------------------------------------------


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


def test_the_first_failure_of_a_class_is_shown_and_noted_in_the_servers_words(server, monkeypatch, capfd):
    async def refuse(server, http, body):
        return failure(503, f"too busy \x1b[2J for {KEY}")

    monkeypatch.setitem(FAULTS, "refuse", refuse)
    failing(server, refuse=2)
    bench = Bench(server, critic_retries=2)
    bench.ask()
    first, second, answered = bench.calls
    assert first.error == second.error == "api_error" and answered.error is None
    assert "too busy" in first.detail and second.detail is answered.detail is None
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("first api_error of openai/judge: status 503: too busy") == 1
    assert KEY not in said + first.detail and "\x1b" not in said


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


# -- rate limits -----------------------------------------------------------------------------------------------------


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
    assert 0.8 * module.MAX_RATE_LIMIT_WAIT_S < sum(bench.waits) <= module.MAX_RATE_LIMIT_WAIT_S
    assert max(bench.waits) <= module.MAX_WAIT_S


def test_a_server_that_wants_an_hour_is_not_waited_for(server):
    server.retry_after = 3600
    server.faults = {"rate_limit": 1.0}
    bench = Bench(server)
    assert outcome(bench).kind == "rate_limit"
    assert len(server.requests) == 1 and bench.waits == bench.pauses == []


# -- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error_500", "empty_reply"])
def test_a_run_in_which_nothing_is_answered_for_one_patience_ends(server, monkeypatch, fault):
    monkeypatch.setattr(module, "PATIENCE_S", 20.0)
    server.faults = {fault: 1.0}
    bench = Bench(server, critic_retries=3, critic_timeout=10.0)

    async def work(client):
        for number in range(1000):
            with contextlib.suppress(CallFailed):
                await question(client, str(number))

    with pytest.raises(Stopped, match=r"given no verdict for \d+ s \(.*check the server.*run the same command"):
        bench.run(work)
    assert module.PATIENCE_S <= bench.now < module.PATIENCE_S + 10


def test_answers_idle_time_and_refusals_are_no_silence(server):
    server.faults = {"error_500": 1.0}
    bench = Bench(server, critic_retries=0)

    async def work(client):
        for number in range(40):
            server.faults = {"error_500": 1.0} if number % 10 else {}
            with contextlib.suppress(CallFailed):
                await question(client, str(number))
            bench.now += module.PATIENCE_S  # a training run samples
        server.faults = {"context_window": 1.0}
        for number in range(3):
            with contextlib.suppress(CallFailed):
                await question(client, f"long {number}")

    bench.run(work)


def test_a_timeout_longer_than_the_patience_is_waited_for_twice(server):
    client = Bench(server, critic_timeout=900.0).make()
    assert client._patience == 1800.0


# -- replies that end in thoughts ------------------------------------------------------------------------------------


THOUGHTS = {
    "reasoning": {"content": None, "reasoning_content": "Let me see."},
    "reasoning and half a verdict": {"content": '{"scores": [{"ind', "reasoning_content": "Let me see."},
    "open tag": {"content": "<think>\nLet me see {"},
    "no opening tag": {"content": 'Let me see.</think>\n{"scores": ['},
}


@pytest.mark.parametrize("kind", THOUGHTS)
def test_a_reply_cut_in_its_thoughts_has_a_class_and_names_the_flags(server, monkeypatch, capfd, kind):
    async def cut(server, http, body):
        made = completion(body, "", reason="length")
        made["choices"][0]["message"] = {"role": "assistant", **THOUGHTS[kind]}
        return web.json_response(made)

    monkeypatch.setitem(FAULTS, "cut", cut)
    server.faults = {"cut": 1.0}
    bench = Bench(server)
    failed = outcome(bench)
    assert (failed.kind, failed.may_be_billed, len(bench.calls)) == ("thinking_cut", True, 1)  # it is not asked again
    said = " ".join(capfd.readouterr().err.split())
    assert "--critic-thinking-tokens (now 2048)" in said and "lower --critic-reasoning-effort" in said
    assert "--critic-max-tokens (now 77)" in outcome(Bench(server, critic_max_tokens=77)).detail


def test_cut_replies_without_thoughts_are_read(server, monkeypatch):
    async def cut(server, http, body):
        return web.json_response(completion(body, '{"scores": [{"ind', reason="length"))

    monkeypatch.setitem(FAULTS, "cut", cut)
    server.faults = {"cut": 1.0}
    assert Bench(server).ask().text == '{"scores": [{"ind'


WARM = """
import asyncio, sys, time
from ssrctl.critics.llm.litellm_import import import_litellm, warm_up

litellm = import_litellm()
parameters = {"model": "openai/judge", "api_base": sys.argv[1], "api_key": "none"}
router = litellm.Router(model_list=[{"model_name": "openai/judge", "litellm_params": parameters}], num_retries=0)

async def main():
    if sys.argv[2] == "warm":
        await warm_up(router, "openai/judge")
    before = set(sys.modules)
    await router.acompletion(model="openai/judge", messages=[{"role": "user", "content": "1"}])
    print(len(set(sys.modules) - before))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_first_call_imports_nothing_within_its_time_limit(server):
    def imported(state):
        command = [sys.executable, "-c", WARM, server.base_url, state]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)

    assert imported("cold") > 100 and imported("warm") < 20
    assert len(server.requests) == 2  # nothing is sent to warm up


# -- money and cancellation ------------------------------------------------------------------------------------------


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


# -- many at once ----------------------------------------------------------------------------------------------------


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
from ssrctl.critics.llm.client import CallTag, JudgeClient
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.meter import Meter
from ssrctl.critics.llm.pacing import Pacer

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
def test_nothing_is_left_open_and_only_the_first_failure_of_a_class_is_printed(server):
    server.grade = lambda messages: "fine"
    server.faults = {"error_500": 0.2, "closed_socket": 0.2}
    # -X dev: warnings of sockets and sessions left open, and of tasks never awaited.
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", CLEAN_EXIT, server.base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    said = [re.match(r"warning: first (\w+) of openai/judge: ", line) for line in done.stderr.splitlines()]
    assert all(said) and sorted(match[1] for match in said) == ["api_error", "connection"], done.stderr
