"""The rule critic: where the blame goes, and what the rewards of eq. 2-3 are."""

import dataclasses
import itertools
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.critics import rule as rule_module
from ssrctl.critics.base import missing, score_all, scored
from ssrctl.critics.rule import RuleCritic
from ssrctl.io.records import FinalAnswer, Rollout, StepSpan

QUESTION = "48*6-2*9+2-3=?"
SOLUTION = ["48*6=88", "88-2=86", "86*9=74", "74+2=76", "76-3=73", "####73"]


def judge(lines, *, question=QUESTION, answer="73", modulus=100):
    """One step per line; a line that starts with #### or A: is the final answer."""
    lines = [line + "\n" for line in lines]
    ends = list(itertools.accumulate(len(line) for line in lines))
    steps = [
        StepSpan(start=end - len(line), end=end, kind="final" if line.startswith(("####", "A:")) else "step")
        for line, end in zip(lines, ends, strict=True)
    ]
    extra = {} if modulus is None else {"modulus": modulus}
    rollout = Rollout(id="q/0", question=question, answer=answer, response="".join(lines), steps=steps, extra=extra)
    (scores,) = score_all(RuleCritic(), [rollout])
    return [score.score if score.error is None else score.error for score in scores]


def changed(index, line):
    return [line if place == index else old for place, old in enumerate(SOLUTION)]


def test_a_right_solution_of_the_bundled_task():
    assert judge(SOLUTION) == [100] * 6


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # A false equality; the steps after it are right given it, the final answer copies a wrong result.
        (["48*6=88", "88-2=85", "85*9=65", "65+2=67", "67-3=64", "####64"], [100, -100, 100, 100, 100, 0]),
        # A true equality on a number that is not the previous result.
        (["48*6=88", "87-2=85", "85*9=65", "65+2=67", "67-3=64", "####64"], [100, -50, 100, 100, 100, 0]),
        (changed(0, "47*6=82"), [-50, -50, 100, 100, 100, 100]),
        (changed(2, "86*8=88"), [100, 100, -50, -50, 100, 100]),  # the operand is not the question's
        (changed(3, "74-2=72"), [100, 100, 100, -50, -50, 100]),  # nor is the operator
        (changed(0, "48*6=288"), [-100, -50, 100, 100, 100, 100]),  # results are reduced modulo 100
        (changed(1, "88-2=-14"), [100, -100, -50, 100, 100, 100]),
        (changed(1, "nonsense"), [100, "no_equation", -50, 100, 100, 100]),
        ([*SOLUTION[:5], "73+2=75", "####73"], [100, 100, 100, 100, 100, -50, 100]),
        (changed(5, "####"), [100, 100, 100, 100, 100, 0]),
        (SOLUTION[:5], [100] * 5),
        ([*SOLUTION[:5], "####072"], [100, 100, 100, 100, 100, 0]),
        ([*SOLUTION[:5], "####073"], [100] * 6),
    ],
)
def test_blame_in_the_bundled_task(lines, expected):
    assert judge(lines) == expected


def test_text_without_a_modulus():
    question = "Tom has 3 boxes of 12 eggs and sells half. How many are left?"
    plain = {"question": question, "modulus": None, "answer": "18"}
    assert judge(["There are 3*12 = 36 eggs.", "He sells 36/2=<<36/2=18>>18.", "A: 18"], **plain) == [100, 100, 100]
    assert judge(["There are 3*12 = 35 eggs.", "He keeps 35/2=17.5", "A: 17.5"], **plain) == [-100, 100, 0]
    assert judge(["There are 7*12 = 84 eggs.", "So many.", "A: 18"], **plain) == [50, "no_equation", 100]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("He sells 36/2=<<36/2=18>>18.", 100),
        ("He sells 36/2=<<36/2=18>>19.", -100),  # copied wrongly
        ("He sells $<<36/2=19>>19.", -100),  # calculated wrongly
        ("He sells 36/2=<<36/3=12>>12.", -100),  # the text says something else than the mark
        ("He sells <<18=18>>18.", "no_equation"),  # nothing was calculated
        ("He sells <<18=18>>81.", -100),
        ("That is 36*1.07=<<36*1.07=38.519999999999996>>38.52.", 100),
        ("That is 36*1.08=<<36*1.08=38.519999999999996>>38.52.", -100),
    ],
)
def test_calculator_marks(line, expected):
    question = "Tom has 3 boxes of 12 eggs and sells half at 7% more. How many are left?"
    found = judge(["There are 3*12 = 36 eggs.", line, "A: 18"], question=question, modulus=None, answer="18")
    assert found == [100, expected, 100]


@pytest.mark.parametrize(
    ("question", "line", "expected"),
    [
        ("A pen costs 80 cents. What do twelve cost?", "12*0.8=9.6", 100),
        ("Of 50 cars 20% are red.", "50*.2=10, and 50*.8=40, and 50*20/100=10, and 50*1.2=60, and 50*20*.01=10", 100),
        ("Of 50 cars 20% are red.", "50*.3=15", 50),
        ("She reads for 3 hours, half a page a minute.", "3*60=180 and 180/2=90", 100),
        ("She reads 3 books of fifty-two pages.", "3*52=156", 100),
        ("She reads 3 books of fifty-two pages.", "3*53=159", 50),
        ("Three-fourths of the 16 boys left.", "16*3/4=12 and 16*.75=12", 100),
        ("She walks 2 and a half miles on 5 days.", "2.5*5=12.5", 100),
        ("She walks 2 miles on 5 days.", "2.5*5=12.5", 50),
        ("He has 9 eggs and 3 bags.", "3-9=-6 and 6+9=15", 100),  # the size of a result counts
        ("He has 9 eggs.", "In 3 weeks he has 9*7=63.", 100),  # seven days in a week
    ],
)
def test_where_numbers_come_from(question, line, expected):
    assert judge([line], question=question, modulus=None) == [expected]


def test_an_answer_that_could_not_be_compared_is_missing(monkeypatch):
    given_up = FinalAnswer(extracted="73", correct=None, way="hashes", outcome="timed_out")
    monkeypatch.setattr(rule_module, "check_answer", lambda *_, **__: given_up)
    assert judge(SOLUTION)[-1] == judge(SOLUTION, answer=None)[-1] == "answer_timeout"


def test_without_a_reference_the_last_result_decides():
    assert judge(SOLUTION, answer=None) == [100] * 6
    assert judge(changed(5, "####72"), answer=None)[-1] == 0
    assert judge(["I think so.", "####72"], answer=None, modulus=None, question="Why?") == [
        "no_equation",
        "no_reference",
    ]


def test_rollouts_pass_one_by_one():
    taken = []

    def source():
        for number in range(3):
            taken.append(number)
            yield Rollout(id=str(number), question="", response="", steps=[])

    critic = RuleCritic()
    for number, (rollout, scores) in enumerate(critic.stream(source())):
        assert rollout.id == str(number) and scores == [] and len(taken) == number + 1
    assert number == 2 and critic.summary() == {} and critic.identity is None


@given(
    st.text(alphabet="0123456789+-*/=().,$x #A:\\{}<>%half²٣", max_size=200),
    st.sampled_from([None, 100, True, 0, -3, "7"]),
)
def test_no_response_raises(text, modulus):
    assert len(judge([text, text], modulus=modulus, question=text)) == 2


def test_huge_responses_end():
    for text in ("9" * 200_000 + "=1", "1+" * 20_000 + "1=2", "(" * 20_000 + "1=1", "2*3=6\n" * 3_000):
        judge([text])


def gold_solutions(data_dir, every):
    """(question, lines) of worked solutions by people."""
    rows = [json.loads(line) for line in (data_dir / "gsm8k_train.jsonl").open(encoding="utf-8")][::every]
    return [(row["question"], row["solution"].split("\n")) for row in rows]


def test_few_false_alarms_in_peoples_solutions(data_dir):
    found = [
        score
        for question, lines in gold_solutions(data_dir, 4)
        for score in judge(lines, question=question, modulus=None, answer=None)
    ]
    shares = {score: found.count(score) / len(found) for score in (-100, 50, 100, "no_equation")}
    assert len(found) > 1_500
    assert shares[-100] < 0.005 and shares[50] < 0.03 and shares[100] > 0.88 and shares["no_equation"] < 0.1


@pytest.mark.parametrize(("marks", "detected"), [(True, 0.97), (False, 0.9)])
def test_a_changed_result_is_found(data_dir, marks, detected):
    """In one line of each solution the calculator's result and its copy are changed."""
    copied = re.compile(r"=(\d+)>>\1(?![\d,]|\.\d)")
    hits = []
    for number, (question, lines) in enumerate(gold_solutions(data_dir, 8)):
        places = [place for place, line in enumerate(lines) if copied.search(line)]
        if not places:
            continue
        place = places[number % len(places)]
        change = 1 + number % 7

        def raised(match, change=change):
            result = int(match.group(1)) + change
            return f"={result}>>{result}"

        lines[place] = copied.sub(raised, lines[place], count=1)
        lines = lines if marks else [re.sub("<<[^<>]*>>", "", line) for line in lines]
        hits.append(judge(lines, question=question, modulus=None, answer=None)[place] == -100)
    assert len(hits) > 150 and sum(hits) / len(hits) > detected


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["step", "final"]))
def test_rewards(score, kind):
    made = scored(score, kind, "because")
    low = -100 if kind == "step" else 0
    if math.isnan(score) or not low <= score <= 100:
        assert (made.score, made.reward, made.error) == (None, None, "out_of_range")
    else:
        # eq. 2-3 map the ends of each range to the ends of [-1, 1]
        assert made.error is None and made.reward == pytest.approx(-1 + 2 * (score - low) / (100 - low), abs=1e-12)


def test_reward_anchors():
    rewards = [scored(s, k).reward for s, k in ((-100, "step"), (0, "step"), (85, "step"), (0, "final"), (75, "final"))]
    assert rewards == [-1.0, 0.0, 0.85, -1.0, 0.5]
    assert dataclasses.asdict(missing("timeout")) == {
        "score": None,
        "reward": None,
        "rationale": None,
        "error": "timeout",
    }
