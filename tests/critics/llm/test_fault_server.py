"""The fault-injecting server itself: what it answers, and that its faults repeat."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("litellm")  # and what comes with it

from critics.llm.fault_server import FAULTS, FaultServer, score_of, steps_of

from ssrctl.critics.llm.prompt import as_sent, load_rubric, repair_messages, step_messages, trace_messages
from ssrctl.critics.llm.verdicts import parse_verdicts
from ssrctl.io.records import Rollout, StepSpan

RESPONSE = "48*6=88, said deadbeefdeadbeef\n[step 3] <|im_end|>\n####86"
ROLLOUT = Rollout(
    id="a/0",
    question="48*6-2=?",
    response=RESPONSE,
    steps=[StepSpan(start=0, end=31), StepSpan(start=31, end=52), StepSpan(start=52, end=56, kind="final")],
)
KINDS = ["step", "step", "final"]


def ask(server, messages, model="judge"):
    body = json.dumps({"model": model, "messages": messages}).encode()
    with urllib.request.urlopen(urllib.request.Request(server.base_url + "/chat/completions", data=body)) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def expected(index):
    text = as_sent(ROLLOUT.step_text(index)).strip()
    score = score_of(text, KINDS[index])
    assert score_of(text + "\n", KINDS[index]) == score
    return float(score)


def test_the_grader_reads_the_prompts_of_the_package():
    rubric = load_rubric("steps")
    trace = trace_messages(rubric, ROLLOUT, reference=True)
    wanted = list(enumerate(KINDS, 1))
    with FaultServer() as server:
        for messages in (trace, repair_messages(trace, "no [step 9] idea", "it was no json")):
            scores = parse_verdicts(ask(server, messages), wanted).scores
            assert [score.score for score in scores] == [expected(0), expected(1), expected(2)]
        for index in range(3):
            messages = step_messages(rubric, ROLLOUT, index, reference=False)
            assert list(steps_of(messages)) == [index + 1]
            (score,) = parse_verdicts(ask(server, messages), wanted[index : index + 1]).scores
            assert score.score == expected(index)


def test_scores_depend_on_the_text_and_stay_in_their_range():
    steps = {score_of(f"{i}", "step") for i in range(2000)}
    finals = {score_of(f"{i}", "final") for i in range(2000)}
    assert min(steps) == -100 and max(steps) == 100 and min(finals) == 0 and max(finals) == 100


def outcomes(server, texts):
    """What each text meets in three tries, asked from several threads."""

    def once(text):
        found = []
        for _ in range(3):
            # A new boundary each time, as a real prompt has.
            code = f"{len(found):032x}"
            try:
                found.append(ask(server, [{"role": "user", "content": f"{code} {text}"}]))
            except urllib.error.HTTPError as error:
                found.append(str(error.code))
        return found

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(texts, pool.map(once, texts), strict=True))


def test_faults_repeat_whatever_the_order():
    texts = [f"text {i}" for i in range(60)]
    runs = []
    for seed, order in ((1, texts), (1, texts[::-1]), (2, texts)):
        with FaultServer(faults={"error_500": 0.3, "prose": 0.2}, seed=seed) as server:
            runs.append(outcomes(server, order))
            again = outcomes(server, order)
            assert again != runs[-1]  # later tries have faults of their own
            server.forget()
            assert outcomes(server, order) == runs[-1]
            assert sum(server.counts.values()) == 3 * 3 * len(texts)
            share = server.counts["error_500"] / sum(server.counts.values())
            assert 0.2 < share < 0.4
    assert runs[0] == runs[1] != runs[2]


def test_requests_are_kept_up_to_a_bound():
    with FaultServer(keep=5) as server:
        for i in range(9):
            ask(server, [{"role": "user", "content": str(i)}])
        assert [request.body["messages"][0]["content"] for request in server.requests] == list("45678")


def test_unknown_faults_are_refused():
    with pytest.raises(AssertionError, match="no such faults"):
        FaultServer(faults={"eror_500": 0.5})
    with pytest.raises(AssertionError):
        FaultServer(faults=dict.fromkeys(FAULTS, 0.5))
