"""The judge's client and its models: fallbacks, keys, refusals, and the form of replies that they are bound to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections import Counter

import pytest

pytest.importorskip("litellm")  # and what comes with it

from aiohttp import web
from critics.llm.client_bench import KEY, Bench, echo, outcome, question
from critics.llm.fault_server import FAULTS, FaultServer, completion, failure

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm import client as module
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.verdicts import Verdicts
from ssrctl.errors import UserError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server():
    with FaultServer(grade=echo, stall_seconds=20) as made:
        yield made


# -- fallbacks -------------------------------------------------------------------------------------------------------


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
        bench.now += module.COOLDOWN_S + 1
        await question(client, "later")

    bench.run(many)
    asked = Counter(request.body["model"] for request in server.requests)
    assert asked == {"judge": module.COOLDOWN_AFTER + 1, "second": 7}


def test_when_all_fail_the_last_failure_counts(server):
    server.fault_of = lambda body, attempt: "closed_socket" if body["model"] == "judge" else "context_window"
    failed = outcome(Bench(server, **FALLBACK))
    assert (failed.kind, failed.may_be_billed) == ("context_window", True)


def test_the_endpoint_is_for_models_of_the_first_ones_provider_alone(server, monkeypatch):
    from ssrctl.critics.llm.models import prepare_models

    monkeypatch.setenv("ANTHROPIC_API_KEY", "other-0123456789")
    fallback = ["openai/second", "anthropic/claude-sonnet-4-5", "openai/judge"]
    options = CriticOptions(
        critic="llm", critic_model="openai/judge", critic_fallback=fallback, critic_api_base="http://own/v1"
    )
    models = prepare_models(options, None)
    assert [model.parameters.get("api_base") for model in models] == ["http://own/v1"] * 2 + [None]
    assert [model.endpoint for model in models] == ["http://own/v1"] * 2 + ["anthropic"]
    assert [model.key_variable for model in models] == ["OPENAI_API_KEY"] * 2 + ["ANTHROPIC_API_KEY"]


# -- keys ------------------------------------------------------------------------------------------------------------


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


# -- what every question would meet ----------------------------------------------------------------------------------


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
        for number in range(module.MAX_REJECTED - 1):
            with pytest.raises(CallFailed, match="bad_request"):
                await question(client, f"bad {number}")
        await question(client, "one more")

    server.faults = {"refuse": 1.0}
    with pytest.raises(UserError, match=r"all 10 prompts to openai/judge .status 400: max_tokens is too large"):
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


# -- the form of replies ---------------------------------------------------------------------------------------------


def forms(server):
    """Type of each request's response_format."""
    return [request.body.get("response_format", {}).get("type") for request in server.requests]


@pytest.mark.parametrize(
    "model", ["openai/gpt-4o", "openai/gpt-4-turbo", "openai/judge", "hosted_vllm/judge", "lm_studio/judge"]
)
def test_models_of_an_own_server_are_bound_to_the_schema(server, model):
    bench = Bench(server, schema=Verdicts, critic_model=model)
    bench.run(question)
    assert forms(server) == ["json_schema"]
    sent = server.requests[0].body["response_format"]["json_schema"]["schema"]
    assert sent["properties"].keys() == Verdicts.model_fields.keys()


def test_json_is_asked_for_at_a_provider_that_is_known_to_give_it(server):
    from ssrctl.critics.llm.models import prepare_models

    def form(model, **settings):
        options = CriticOptions(critic="llm", critic_model=model, **settings)
        return prepare_models(options, Verdicts)[0].reply_format

    assert form("openai/gpt-4-turbo") == {"type": "json_object"}
    assert form("openai/no-such-model") is None


def no_forms(status):
    async def refuse(server, http, body):
        if "response_format" in body:
            return failure(status, "what is a response_format?")
        return web.json_response(completion(body, "plain"))

    return refuse


# 500: servers fail so on a schema that they cannot turn into a grammar.
@pytest.mark.parametrize(("model", "status"), [("gpt-4o", 400), ("judge", 400), ("judge", 422), ("judge", 500)])
def test_a_server_that_refuses_the_schema_is_asked_without_and_never_with_it_again(
    server, monkeypatch, capfd, model, status
):
    monkeypatch.setitem(FAULTS, "no_forms", no_forms(status))
    server.faults = {"no_forms": 1.0}
    bench = Bench(server, schema=Verdicts, critic_model=f"openai/{model}", critic_retries=0)

    async def work(client):
        # Together: both are under way with the schema before the first refusal.
        replies = await asyncio.gather(question(client, "a"), question(client, "b"))
        replies.append(await question(client, "c"))
        assert [reply.text for reply in replies] == ["plain"] * 3

    bench.run(work)
    assert Counter(forms(server)) == {"json_schema": 2, None: 3} and forms(server)[-1] is None
    refused = "bad_request" if status < 500 else "api_error"
    assert Counter(call.error for call in bench.calls) == {refused: 2, None: 3}
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("refuses response_format") == 1


def test_a_fallback_at_an_endpoint_that_refused_the_schema_is_asked_without_it(server, monkeypatch):
    monkeypatch.setitem(FAULTS, "no_forms", no_forms(400))
    server.fault_of = lambda body, attempt: "context_window" if "long" in str(body["messages"]) and body["model"] == "judge" else "no_forms"  # fmt: skip
    bench = Bench(server, schema=Verdicts, **FALLBACK)

    async def work(client):
        assert (await question(client, "first")).model == "openai/judge"
        assert (await question(client, "long")).model == "openai/second"

    bench.run(work)
    assert forms(server) == ["json_schema", None, None, None]


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
            assert len(server.requests) == before + requests

    bench.run(work)
    assert forms(server) == ["json_schema", None, "json_schema", "json_schema"]


# -- settings of a request ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["openai/judge", "openai/gpt-4o", "hosted_vllm/judge"])
def test_reasoning_effort_and_extra_body_are_sent(server, model):
    bench = Bench(
        server,
        critic_model=model,
        critic_reasoning_effort="minimal",
        critic_extra_body='{"top_k": 20, "chat_template_kwargs": {"enable_thinking": false}}',
    )
    bench.ask()
    (request,) = server.requests
    assert request.body["reasoning_effort"] == "minimal" and request.body["top_k"] == 20
    assert request.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "extra_body" not in request.body and "allowed_openai_params" not in request.body
    Bench(server, critic_model=model).ask()
    assert not {"reasoning_effort", "top_k"} & server.requests[-1].body.keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"critic_extra_body": "[1]"}, "must be a json object, got list"),
        ({"critic_extra_body": "{"}, "is not valid json"),
        ({"critic_extra_body": '{"top_p": NaN}'}, "NaN is not a number of json"),
        ({"critic_extra_body": '{"a": "\\ud800"}'}, "lone surrogate"),
        ({"critic_extra_body": '{"max_tokens": 9}'}, "'max_tokens' is set by the critic .use --critic-max-tokens"),
        ({"critic_extra_body": '{"messages": []}'}, "'messages' is set by the critic"),
        ({"critic_extra_body": '{"api_key": "hush-hush"}'}, "'api_key' looks like a credential"),
        ({"critic_extra_body": '{"x": [{"accessToken": "hush-hush"}]}'}, "'accessToken' looks like a credential"),
        ({"critic_extra_body": '{"user": "sk-hush-hush-hush"}'}, "'user' looks like a credential"),
        ({"critic_reasoning_effort": "very high"}, "must be one word"),
        ({"critic_max_tokens": 0}, "--critic-max-tokens must be at least 1"),
    ],
)
def test_settings_that_cannot_be_sent_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as raised:
        CriticOptions(critic="llm", critic_model="openai/judge", **settings)
    assert "hush" not in str(raised.value)


def test_tokens_that_are_no_secret_may_be_in_the_extra_body():
    body = {"min_tokens": 1, "stop_token_ids": [2], "thinking_token_budget": 9, "prompt_cache_key": "a", "seed": 1}
    options = CriticOptions(critic="llm", critic_model="openai/judge", critic_extra_body=body)  # as from a yaml file
    assert options.critic_extra_body_object == body


@pytest.mark.parametrize(
    ("place", "model", "variable"),
    [
        ("https://own/v1?api_key=hush-hush", "openai/judge", "OPENAI_API_KEY"),
        ("https://own/v1?api-version=1&api%2Dkey=hush-hush", "azure/judge", "AZURE_API_KEY"),
        ("https://own/v1?a=1;token=hush-hush", "hosted_vllm/judge", "HOSTED_VLLM_API_KEY"),
        ("https://own/v1?sv=1&sig=hush-hush", "judge", "OPENAI_API_KEY"),
        ("https://own/v1#access_token=hush-hush", "openai/judge", "OPENAI_API_KEY"),
        ("https://me:hush-hush@own/v1", "openai/judge", "OPENAI_API_KEY"),
        ("https://own/sk-hush-hush-hush/v1", "openai/judge", "OPENAI_API_KEY"),
    ],
)
def test_keys_in_an_address_are_refused_before_anything_is_stored(place, model, variable):
    with pytest.raises(UserError, match=f"set the variable {variable}") as raised:
        CriticOptions(critic="llm", critic_model=model, critic_api_base=place)
    assert "hush" not in str(raised.value) and "\n" not in str(raised.value)
    CriticOptions(critic="llm", critic_model=model, critic_api_base="https://own/v1?api-version=2024-10-21&tokens=5")
