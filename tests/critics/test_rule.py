"""The rule critic: where the blame goes, and what the rewards of eq. 2-3 are."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.critics.base import missing, scored
from ssrctl.critics.rule import RuleCritic
from ssrctl.io.records import Rollout
from ssrctl.text.segment import segment

QUESTION = "48*6-2*9+2-3=?"
SOLUTION = ["48*6=88", "88-2=86", "86*9=74", "74+2=76", "76-3=73", "####73"]


def judge(lines, *, question=QUESTION, answer="73", modulus=100):
    response = "\n".join(lines)
    extra = {} if modulus is None else {"modulus": modulus}
    rollout = Rollout(
        id="q/0", question=question, answer=answer, response=response, steps=segment(response), extra=extra
    )
    (scores,) = RuleCritic().score([rollout])
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
        (changed(5, "####"), [100, 100, 100, 100, 100, "no_answer"]),
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


def test_without_a_reference_the_last_result_decides():
    assert judge(SOLUTION, answer=None) == [100] * 6
    assert judge(changed(5, "####72"), answer=None)[-1] == 0
    assert judge(["I think so.", "####72"], answer=None, modulus=None, question="Why?") == [
        "no_equation",
        "no_reference",
    ]


def test_progress_and_empty_steps():
    done = []
    rollouts = [Rollout(id=str(i), question="", response="", steps=[]) for i in range(3)]
    assert RuleCritic().score(rollouts, on_done=done.append) == [[], [], []] and sum(done) == 3


@given(
    st.text(alphabet="0123456789+-*/=().,$x \n#A:\\{}<>%", max_size=200), st.sampled_from([None, 100, True, 0, -3, "7"])
)
def test_no_response_raises(text, modulus):
    scores = judge([text], modulus=modulus)
    assert len(scores) == len(segment(text))


def test_huge_responses_end():
    for text in ("9" * 200_000 + "=1", "1+" * 20_000 + "1=2", "(" * 20_000 + "1=1", "2*3=6\n" * 3_000):
        judge([text])


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
