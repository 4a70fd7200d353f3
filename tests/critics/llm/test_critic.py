"""The llm critic as a whole: what it asks, keeps, repairs and gives up on, against a server on loopback."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

pytest.importorskip("litellm")

from critics.llm.fault_server import FaultServer, score_of, steps_of, verdicts

from ssrctl.configs import CriticOptions
from ssrctl.critics.base import CriticResources, score_all
from ssrctl.critics.registry import make_critic
from ssrctl.errors import Stopped, UserError
from ssrctl.io.jsonl import read_jsonl
from ssrctl.io.records import Rollout, StepSpan

KINDS = ("step", "step", "final")


def rollout(name="a/0", response="48*6=88\n88-2=86\n####86", answer="86"):
    cuts = [0, *(place + 1 for place, letter in enumerate(response) if letter == "\n"), len(response)]
    kinds = ["step"] * (len(cuts) - 2) + ["final"]
    steps = [StepSpan(start=a, end=b, kind=k) for a, b, k in zip(cuts, cuts[1:], kinds, strict=False)]
    return Rollout(id=name, question="48*6-2=?", answer=answer, response=response, steps=steps)


def true_scores(made):
    return [score_of(made.step_text(i), step.kind) for i, step in enumerate(made.steps)]


def options(server, tmp_path, **settings):
    settings = {"critic_cache_dir": tmp_path / "cache", "critic_retries": 2, "critic_timeout": 5.0} | settings
    return CriticOptions(critic="llm", critic_model="openai/judge", critic_api_base=server.base_url, **settings)


@pytest.fixture
def opened(monkeypatch):
    """Makes critics that do not wait between tries, and closes them."""
    monkeypatch.setattr("ssrctl.critics.llm.client.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("ssrctl.critics.llm.client.MAX_RATE_LIMIT_WAIT_S", 0.01)
    made = []

    def make(given, **resources):
        made.append(make_critic(given, CriticResources(**resources)))
        return made[-1]

    yield make
    for critic in made:
        critic.close()


def errors(scores):
    return [score.error for score in scores]


@pytest.mark.parametrize("per_step", [False, True])
def test_every_step_gets_its_own_score(opened, tmp_path, per_step):
    rollouts = [rollout(f"a/{i}", f"Foo {i}\nsecond {i}\n####{i}") for i in range(12)]
    rollouts.append(Rollout(id="a/empty", question="?", response="", steps=[]))
    with FaultServer() as server:
        critic = opened(options(server, tmp_path, critic_per_step=per_step))
        scores = score_all(critic, rollouts)
        assert [[s.score for s in mine] for mine in scores] == [true_scores(r) for r in rollouts]
        assert server.counts.total() == (36 if per_step else 12)
        asked = [request.body for request in server.requests]
    first = scores[0]
    assert first[0].reward == first[0].score / 100 and first[2].reward == (first[2].score - 50) / 50
    assert all(body["temperature"] == 0 for body in asked)
    assert all("Foo" not in body["messages"][0]["content"] for body in asked)
    if per_step:  # a step is judged with those before it, and none after it
        lasts = {max(steps_of(body["messages"]), default=0) for body in asked}
        assert lasts == {1, 2, 3}
    assert critic.summary()["calls"] == server.counts.total() and critic.summary()["completion_tokens"] > 0


def test_what_was_judged_is_not_asked_again(opened, tmp_path):
    ledger = tmp_path / "calls.jsonl"
    with FaultServer() as server:
        first = score_all(opened(options(server, tmp_path)), [rollout()])
        critic = opened(options(server, tmp_path), ledger=ledger)
        assert score_all(critic, [rollout("b/7")]) == first and server.counts.total() == 1
        assert critic.summary()["cached"] == 1 and critic.summary()["calls"] == 0
        critic.close()
        ((_, row),) = read_jsonl(ledger)
        assert row["cached"] is True and row["id"] == "b/7"
        # everything that the judgement depends on makes another question of it
        for other in (
            {"critic_per_step": True},
            {"critic_temperature": 0.5},
            {"critic_show_reference": False},
            {"critic_rubric": "correctness"},
            {"critic_cache": False},
            {"critic_model": "openai/another"},
            {"critic_reasoning_effort": "low"},
            {"critic_extra_body": '{"top_k": 1}'},
            {"critic_api_base": server.base_url.replace("127.0.0.1", "localhost")},
        ):
            before = server.counts.total()
            given = options(server, tmp_path)
            for name, value in other.items():
                setattr(given, name, value)
            score_all(opened(given), [rollout()])
            assert server.counts.total() > before, other
        critic = opened(options(server, tmp_path))
        before = server.counts.total()
        critic.repeat = 1
        score_all(critic, [rollout()])
        assert server.counts.total() == before + 1


def test_the_identity_names_what_the_scores_depend_on(opened, tmp_path):
    with FaultServer() as server:
        same = {
            "critic_max_concurrency": 2,
            "critic_timeout": 3.0,
            "critic_requests_per_minute": 1e6,
            "critic_cache": False,
        }
        base = opened(options(server, tmp_path)).identity
        assert opened(options(server, tmp_path, **same)).identity == base
        for name, value in {"critic_per_step": True, "critic_rubric": "correctness", "critic_temperature": 1.0}.items():
            assert opened(options(server, tmp_path, **{name: value})).identity != base


FAILING = {
    "error_500": "api_error",
    "rate_limit": "rate_limit",
    "stall": "timeout",
    "closed_socket": "connection",
    "cut_body": "connection",
    "truncated_json": "api_error",
    "wrong_type": "api_error",
    "no_choices": "empty_reply",
    "context_window": "context_window",
    "content_filter": "content_filter",
    "empty_reply": "empty_reply",
    "null_reply": "empty_reply",
    "prose": "bad_json",
    "half_reply": "bad_json",
    "huge_reply": "bad_json",
    "too_few": "missing_index",
    "too_many": "bad_index",
    "from_zero": "bad_index",
    "out_of_range": "out_of_range",
    "nan": "out_of_range",
}


@pytest.mark.parametrize(("fault", "error"), FAILING.items())
def test_a_server_that_always_fails_gives_no_score(opened, tmp_path, fault, error):
    with FaultServer(faults={fault: 1.0}) as server:
        (scores,) = score_all(opened(options(server, tmp_path, critic_timeout=0.5, critic_retries=1)), [rollout()])
        wrong = [s for s, true in zip(scores, true_scores(rollout()), strict=True) if s.score not in (None, true)]
        assert wrong == []
        assert error in errors(scores) and errors(scores)[-1] == error
        assert all(s.reward is None for s in scores if s.score is None)


@pytest.mark.parametrize("fault", [kind for kind in FAILING if kind not in ("context_window", "content_filter")])
def test_a_failure_that_passes_costs_nothing_but_a_try(opened, tmp_path, fault):
    with FaultServer(faults={fault: 1.0}) as server:
        server.fault_of = lambda text, attempt: fault if server.counts.total() == 0 else None
        (scores,) = score_all(opened(options(server, tmp_path, critic_timeout=0.5)), [rollout()])
        assert [s.score for s in scores] == true_scores(rollout())
        assert server.counts.total() == 2
        (again,) = score_all(opened(options(server, tmp_path)), [rollout()])
        assert again == scores and server.counts.total() == 2


def test_a_reply_that_stays_unreadable_is_not_kept(opened, tmp_path):
    with FaultServer(faults={"prose": 1.0}) as server:
        score_all(opened(options(server, tmp_path)), [rollout()])
        assert server.counts.total() == 2  # the question and one repair
        repair = server.requests[-1].body["messages"]
        assert "JSON" in repair[-1]["content"] and "The student does well" in repair[-1]["content"]
        server.faults.clear()
        (scores,) = score_all(opened(options(server, tmp_path)), [rollout()])
        assert [s.score for s in scores] == true_scores(rollout())


def test_a_repair_that_says_less_does_not_replace_what_was_read(opened, tmp_path):
    replies = iter([verdicts({1: 10, 3: 60}), "no json"])
    with FaultServer(grade=lambda messages: next(replies)) as server:
        (scores,) = score_all(opened(options(server, tmp_path)), [rollout()])
    assert [s.score for s in scores] == [10, None, 60] and errors(scores) == [None, "missing_index", None]


def test_an_outage_leaves_the_others_their_scores(opened, tmp_path):
    rollouts = [rollout(f"a/{i}", f"Foo {i}\n####{i}") for i in range(40)]
    with FaultServer(faults={"error_500": 0.5}, seed=3) as server:
        scores = score_all(opened(options(server, tmp_path, critic_retries=0)), rollouts)
    lost = sum(s[0].error == "api_error" for s in scores)
    assert 5 < lost < 35
    for mine, made in zip(scores, rollouts, strict=True):
        assert errors(mine) == ["api_error"] * 2 or [s.score for s in mine] == true_scores(made)


def test_the_budget_is_a_hard_cap_and_what_is_done_is_kept(opened, tmp_path):
    rollouts = [rollout(f"a/{i}", f"Foo {i}\n####{i}") for i in range(50)]
    prices = {"critic_input_price": 1.0, "critic_output_price": 2.0, "critic_thinking_tokens": 0}
    with FaultServer() as server:
        critic = opened(options(server, tmp_path, critic_budget_usd=0.02, **prices))
        done = []
        with pytest.raises(Stopped, match="budget"):
            for pair in critic.stream(iter(rollouts)):
                done.append(pair)
        assert 0 < len(done) < 50
        assert 0 < critic.summary()["cost_usd"] <= 0.02
        assert all([s.score for s in scores] == true_scores(made) for made, scores in done)
        # what was paid for is kept, so the same budget goes further
        again = opened(options(server, tmp_path, critic_budget_usd=0.02, **prices))
        more = []
        with pytest.raises(Stopped):
            for pair in again.stream(iter(rollouts)):
                more.append(pair)
        assert len(more) > len(done)


def test_a_refused_key_ends_the_run_and_is_shown_nowhere(opened, tmp_path, monkeypatch, capfd, caplog):
    key = "sk-loopback-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    ledger = tmp_path / "calls.jsonl"
    with FaultServer(key="another") as server:
        critic = opened(options(server, tmp_path), ledger=ledger)
        with pytest.raises(UserError) as raised:
            score_all(critic, [rollout(f"a/{i}") for i in range(4)])
        critic.close()
    assert "OPENAI_API_KEY" in str(raised.value)
    out, err = capfd.readouterr()
    assert key not in str(raised.value) + out + err + caplog.text + ledger.read_text(encoding="utf-8")


def test_a_server_that_is_not_there_ends_the_run(opened, tmp_path):
    with FaultServer() as server:
        pass
    given = options(server, tmp_path, critic_retries=0)
    with pytest.raises(UserError, match=r"no connection to the critic's server at http://127\.0\.0\.1"):
        score_all(opened(given), [rollout(f"a/{i}", f"s {i}\n####1") for i in range(100)])


def test_steps_that_do_not_fit_are_missing_and_the_others_are_judged(opened, tmp_path):
    long = rollout(response="fits\n" + "x" * 200_000 + "\nafter\n####1")
    with FaultServer() as server:
        (scores,) = score_all(opened(options(server, tmp_path)), [long])
        assert errors(scores) == [None, "too_long", "too_long", "too_long"]
        assert scores[0].score == score_of("fits", "step")
        (per_step,) = score_all(opened(options(server, tmp_path, critic_per_step=True)), [long])
        assert errors(per_step) == errors(scores) and server.counts.total() == 2


def test_lone_surrogates_can_be_judged(opened, tmp_path):
    with FaultServer() as server:
        (scores,) = score_all(opened(options(server, tmp_path)), [rollout(response="48*6=8\ud800\n####86")])
    assert errors(scores) == [None, None]


def test_no_more_calls_at_once_than_allowed_and_input_is_drawn_as_needed(opened, tmp_path):
    drawn = 0

    def source():
        nonlocal drawn
        for i in range(30):
            drawn += 1
            yield rollout(f"a/{i}", f"Foo {i}\n####{i}")

    with FaultServer(faults={"stall": 1.0}) as server:
        critic = opened(options(server, tmp_path, critic_max_concurrency=3, critic_timeout=60.0))

        def read():
            with pytest.raises(CancelledError):
                next(critic.stream(source()))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        deadline = time.monotonic() + 10
        while server.counts.total() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert server.counts.total() == 3 and drawn <= 6
        critic.close()
        reader.join(10)
        assert not reader.is_alive()


def test_closing_in_the_middle_leaves_nothing_running(opened, tmp_path):
    with FaultServer(faults={"stall": 0.5}, seed=1) as server:
        critic = opened(options(server, tmp_path, critic_timeout=60.0))
        stream = critic.stream(rollout(f"a/{i}", f"Foo {i}\n####{i}") for i in range(30))
        next(stream)
        stream.close()
        critic.close()
        critic.close()  # a second time does nothing
    assert not [thread for thread in threading.enumerate() if thread.name == "llm-critic" and thread.is_alive()]


def test_a_broken_input_line_ends_the_run_with_its_own_message(opened, tmp_path):
    def source():
        yield rollout()
        raise UserError("in.jsonl:2: not valid json")

    with FaultServer() as server, pytest.raises(UserError, match=r"in\.jsonl:2"):
        list(opened(options(server, tmp_path)).stream(source()))


def test_the_token_limit_of_a_reply_grows_with_its_steps(tmp_path):
    from ssrctl.critics.llm.requests import JudgeRequests

    def limits(**settings):
        made = CriticOptions(critic="llm", **({"critic_model": "openai/judge"} | settings))
        return [JudgeRequests(made).max_reply_tokens(steps) for steps in (1, 4, 8, 100)]

    assert limits() == [2048 + 96, 2048 + 384, 4096 + 768, 16384 + 9600]
    assert limits(critic_thinking_tokens=0) == [96, 384, 768, 9600]
    assert limits(critic_thinking_tokens=20000) == [20096, 20384, 20768, 29600]
    assert limits(critic_max_tokens=500) == [500] * 4
    assert limits(critic_model="openai/gpt-4-turbo") == [2144, 2432, 4096, 4096]  # all that it can write


def test_settings_that_are_not_given_change_no_cache_key(tmp_path):
    from ssrctl.critics.llm.requests import JudgeRequests

    made = CriticOptions(critic="llm", critic_model="openai/judge")
    parts = JudgeRequests(made)._key_parts("openai/judge")
    assert parts.keys() == {"critic", "model", "api_base", "prompt_version", "temperature"}
