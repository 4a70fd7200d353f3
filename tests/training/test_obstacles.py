"""A run that learns little says so, with the settings to change."""

from __future__ import annotations

import pytest

from ssrctl.configs import TrainConfig
from ssrctl.training.obstacles import Obstacles

GOOD = {"finished_frac": 0.9, "missing_score_frac": 0.0, "no_signal_responses": 3}


def obstacles(**changes: float) -> Obstacles:
    made = Obstacles(TrainConfig(questions_per_step=2, num_generations=4))
    for step in range(1, 4):
        made.add(GOOD | {"step": step} | changes)
    return made


def test_a_run_that_learns_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    made = obstacles()
    made.warn()
    assert made.describe() == "" and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "share", "change"),
    [
        ({"finished_frac": 0.25}, "75% were cut off", "raise --max-new-tokens (256)"),
        ({"missing_score_frac": 1.0}, "100% of the steps have no score", "use another --critic (rule)"),
        ({"no_signal_responses": 8}, "100% of the responses got no learning signal", "raise --temperature (1)"),
    ],
)
def test_the_share_and_the_setting_are_named_once(
    changes: dict[str, float], share: str, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = obstacles(**changes)
    early = capfd.readouterr().err
    assert "this run learns little: of the responses in steps 1 to 3" in early and share in early and change in early
    assert sum(flag in early for flag in ("--max-new-tokens", "--critic", "--temperature")) == 1
    made.warn()
    assert capfd.readouterr().err == "", "the end of a run of three steps says nothing new"
    made.add(GOOD | {"step": 4} | changes)
    made.warn()
    assert "steps 1 to 4" in capfd.readouterr().err


def test_no_score_at_all_in_a_step_without_steps_is_not_counted() -> None:
    made = Obstacles(TrainConfig())
    made.add(GOOD | {"step": 1, "missing_score_frac": None})
    assert made.describe() == "" and Obstacles(TrainConfig()).describe() == ""
