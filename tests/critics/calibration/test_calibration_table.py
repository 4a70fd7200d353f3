"""The table of a calibration: it holds what the report says, at the widths of terminals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from ssrctl.critics.calibration.table import calibration_table, show_calibration

REPORT: dict[str, Any] = {
    "critic": "llm [bold]openai/gpt[/bold]",
    "repeats": 3,
    "judgements": 1200,
    "stopped": None,
    "traces_given": 400,
    "traces": 400,
    "erroneous": 190,
    "correct": 210,
    "problems": 350,
    "steps": 1797,
    "wrong_below": 0.0,
    "first_error": {
        "f1": {"value": 0.627, "low": 0.599, "high": 0.654, "confidence": 0.95, "num_problems": 350},
        "erroneous_accuracy": 0.661,
        "correct_accuracy": 0.597,
        "undecided_frac": 0.065,
        "erroneous_verdicts": {"early": 0.151, "late": 0.018, "missed": 0.118, "right": 0.661, "undecided": 0.054},
        "correct_verdicts": {"false_alarm": 0.328, "right": 0.597, "undecided": 0.075},
        "f1_missing_as_right": 0.673,
        "f1_by_repeat": [0.619, 0.628, 0.632],
    },
    "best_threshold": {"wrong_below": -12.5, "f1": 0.674},
    "random_f1": 0.202,
    "step_auc": 0.949,
    "step_kappa": {"kappa": 0.712, "steps": 4100},
    "outcome": {
        "of": "final_answer",
        "traces": 399,
        "mean_score": {"auc": 0.772, "correlation": 0.466},
        "min_score": {"auc": 0.856, "correlation": -0.604},
    },
    "noise": {
        "num_steps": 1793,
        "score_std": 29.06,
        "mean_abs_difference": 32.84,
        "icc": 0.364,
        "first_error_changed_frac": 0.531,
    },
    "missing": {"frac": 0.021, "by_class": {"timeout": 0.012, "bad_json": 0.009}},
    "cost": {
        "calls": 1.05,
        "prompt_tokens": 1812.4,
        "completion_tokens": 190.2,
        "cost_usd": 0.00042,
        "cached_frac": 0.25,
        "seconds": 0.231,
        "seconds_per_call": 1.82,
        "spent_usd": 0.378,
    },
}


def shown(report: dict[str, Any], width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(calibration_table(report["critic"], report))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_nothing_is_lost_at_any_width(width: int) -> None:
    text = shown(REPORT, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = " ".join(text.split())
    for value in (
        *("0.627", "0.599", "0.654", "0.202", "0.661", "0.597", "0.673", "0.674", "-12.5", "0.949", "0.772", "+0.466"),
        *("0.856", "-0.604", "29.1", "32.8", "0.364", "0.531", "0.619", "0.632", "2.1%", "timeout 1.2%"),
        *("bad_json 0.9%", "$0.42", "$0.3780", "1,812 prompt", "190 reply", "25% from the cache", "0.23 s", "1.82 s"),
        *("0.151", "0.018", "0.118", "0.054", "0.328", "of 190", "of 210", "1,200 judgements", "399"),
    ):
        assert value in words, value


def test_names_are_not_markup() -> None:
    assert "llm [bold]openai/gpt[/bold]: 400 solutions of 350 problems" in shown(REPORT)


def changed(**values: Any) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    for path, value in values.items():
        *parents, last = path.split("__")
        place = report
        for parent in parents:
            place = place[parent]
        place[last] = value
    return report


def test_what_is_not_known_is_said_and_never_zero() -> None:
    report = changed(
        first_error__f1=None,
        best_threshold=None,
        random_f1=None,
        noise=None,
        step_auc=None,
        step_kappa={"kappa": None, "steps": 0},
        cost__cost_usd=None,
        cost__seconds=None,
        missing={"frac": 0.0, "by_class": {}},
    )
    text = shown(report)
    assert "needs solutions with and without an error" in text
    assert "--repeats 3" in text and "ICC" not in text
    assert "no prices known" in text and "replies came from the cache" in text
    assert "best threshold" not in text
    assert "0.000" not in text
    assert "every reply came from the cache" in shown(changed(cost__cost_usd=None, cost__cached_frac=1.0))


def test_rows_that_say_nothing_are_left_out() -> None:
    nothing = dict.fromkeys(REPORT["cost"]) | {"seconds": 0.00018}
    text = shown(changed(first_error__undecided_frac=0.0, repeats=1, cost=nothing, outcome__of="label", traces=7))
    assert "missing passed" not in text and "cost of" not in text and "calls per" not in text
    assert "judgements of" in text and "1,200 judgements" not in text
    assert "0.18 ms" in text and "no wrong step" in text and "final answer" not in text
    assert "7 of 400 solutions" in text


def test_the_best_threshold_may_be_the_one_in_use() -> None:
    assert "below -12.5, fitted on these solutions; current: below 0" in shown(REPORT)
    text = shown(changed(wrong_below=-12.5))
    assert "the current threshold is the best" in text and "fitted" not in text


def test_the_table_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show_calibration(REPORT)
    out, err = capsys.readouterr()
    assert "first-error F1" in out and err == ""
