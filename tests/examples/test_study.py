"""The study of examples/study: its tasks, its grid, and the statistics of its verdicts."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssrctl import ResponseCritic, Rollout, segment

sys.path.append(str(Path(__file__).parents[2]))

from examples.study import summarise, tasks, words
from examples.study.grid import Grid
from examples.study.run import next_run


def scores(
    question: str, response: str, answer: str | None = None, critic: type[ResponseCritic] = tasks.AlternatingSigns
) -> list[float | None]:
    row = Rollout(
        id="p/0",
        question=question,
        response=response,
        answer=answer,
        steps=segment(response),
        extra={"modulus": 100},
    )
    return [score.score for score in critic().score(row)]  # type: ignore[union-attr]


def test_the_critic_of_alternating_signs_wants_plus_then_minus() -> None:
    assert scores("48?6?2=?", "48+6=54\n54-2=52\n####52", "52") == [100, 100, 100]
    assert scores("48?6?2=?", "48-6=42\n42-2=40\n####40", "52") == [-50, 100, 0]  # true, with the sign of step 2
    assert scores("48?6?2=?", "48+6=55\n55-2=53\n####53", "52") == [-100, 100, 0]


def test_the_conflict_task_keeps_its_splits_apart_and_warms_up_with_wrong_signs() -> None:
    train, heldout = (tasks.alternating(split, 200, 1) for split in ("train", "heldout"))
    assert not {one.question for one in train} & {one.question for one in heldout}
    assert all(set(scores(one.question, one.solution, one.answer)) == {100} for one in heldout)
    noisy = tasks.alternating("train", 200, 1, right_sign=0.7)
    found = [score for one in noisy for score in scores(one.question, one.solution)[:-1]]
    assert set(found) == {100, -50}
    assert 0.65 < found.count(100) / len(found) < 0.75


def test_solutions_in_four_formats_are_all_right_and_told_apart() -> None:
    written = tasks.in_formats("train", 200, 1, **tasks.OF_FORMATS)
    found = [tasks.format_of(one.solution) for one in written]
    assert set(found) == set(tasks.FORMATS)
    for one in written:
        assert set(scores(one.question, one.solution, one.answer, tasks.AnyFormat)) <= {100, None}
    assert tasks.format_of("48*6=88\n88-2+1=87\n####87") == "non=n, nonon=n"


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("48*6=87\n87\n87-2=85\n####85", [-100, None, 100, 0]),
        ("48*6=87-2=85\n####85", [-100, 0]),  # the second sum is true, the line is not
        ("48+6-2=52\n####52", [-50, 0]),
        ("48*6=88\n87\n88-2=86\n####86", [100, -100, 100, 100]),
    ],
)
def test_the_critic_of_formats_judges_a_line_by_its_worst_operation(response: str, wanted: list[float | None]) -> None:
    assert scores("48*6-2=?", response, "86", tasks.AnyFormat) == wanted


def test_word_problems_are_read_from_files_with_whole_answers_and_solutions_without_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sets = {
        "multiarith": [{"input": " Ada has 3 pens and buys 4. How many now? ", "target": 7}],
        "svamp": [
            {"Body": "Bo had 9 nuts. ", "Question": "How many are 9 nuts and 2?", "Answer": 11.0},
            {"Body": "Bo cut 3 m of rope in two", "Question": "How long is a half?", "Answer": 1.5},
        ],
        "gsm8k_train": [
            {"question": "2 and 3?", "solution": "It is 2+3 = <<2+3=5>>5.", "answer": "5"},
            {"question": "2 and 4?", "answer": "It is 2+4 = <<2+4=6>>6.\n#### 6"},  # as on the hub
        ],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("SSRCTL_DATA", str(tmp_path))
    found = words.problems(seed=1)
    assert {one["question"]: one["answer"] for one in found} == {
        "Ada has 3 pens and buys 4. How many now?": "7",
        "Bo had 9 nuts. How many are 9 nuts and 2?": "11",
    }
    assert [one["id"] for one in found] == ["0", "1"]
    assert [one["solution"] for one in words.solutions()] == ["It is 2+3 = 5.\n#### 5", "It is 2+4 = 6.\n#### 6"]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Grid:
    monkeypatch.setattr("examples.study.grid.RESULTS", tmp_path)
    return Grid("full")


def test_a_grid_tunes_on_other_problems_and_seeds_and_reads_its_rows_again(grid: Grid) -> None:
    """A block's runs follow from the rows of the tuning; a torn row is done again."""
    tuning = grid.tuning("arithmetic", "ssr-kronos")
    assert {run.split for run in tuning} == {"valid"}
    assert grid.runs("main", "arithmetic", "ssr-kronos") == []
    for run in tuning:
        grid.add({"key": run.key, "accuracy": 0.5 + (run.settings["learning_rate"] == 0.1)})
    runs = grid.runs("main", "arithmetic", "ssr-kronos")
    assert {run.split for run in runs} == {"test"}
    assert {run.settings["learning_rate"] for run in runs} == {0.1}
    assert not {run.settings["seed"] for run in runs} & {run.settings["seed"] for run in tuning}
    assert grid.runs("tenfold", "arithmetic", "kronos-unprotected")[0].settings["learning_rate"] == 1.0
    with grid.file.open("a", encoding="utf-8") as file:
        file.write('{"key": "half a r')
    assert Grid("full").rows == grid.rows


def test_no_run_starts_beside_one_that_it_is_compared_with(grid: Grid) -> None:
    """Of each run, the full run's folder is made by itself or by the first that needs it, and then only read."""
    grid.data["order"] = [["weights", "arithmetic", ["subnetwork", "full"]]]
    for run in grid.tuning("arithmetic", "full"):
        grid.add({"key": run.key, "accuracy": 0.5})
    subnetwork, full = (grid.runs("weights", "arithmetic", method) for method in ("subnetwork", "full"))
    assert next_run(grid, []) == subnetwork[0]
    assert next_run(grid, full[:1]) is None  # all others need it, the subnetwork of seed 1 for the full run of seed 1
    assert next_run(grid, full[1:2]) == subnetwork[0]
    assert (
        next_run(grid, subnetwork[:1]) == subnetwork[1]
    )  # both may read the full run of seed 0, but not make it again
    for run in subnetwork:
        grid.add({"key": run.key, "accuracy": 0.5})
    assert next_run(grid, subnetwork[1:2]) == full[2]


def test_every_setting_and_every_claim_of_the_grids_is_known(grid: Grid) -> None:
    from ssrctl.configs import TrainConfig

    known = {*TrainConfig.__dataclass_fields__, "measure", "rotated"}
    for data in (Grid("pretrained").data, Grid("quick").data, grid.data):
        for about in data["blocks"].values():
            assert {*about["methods"], about["reference"]} <= data["methods"].keys()
        for claim in data["claims"]:
            assert ("why" in claim) or {claim["of"], claim.get("to", claim["of"])} <= data["methods"].keys()
            assert ("why" in claim) or claim["of"] in data["blocks"][claim["block"]]["methods"]
    for method in grid.data["methods"]:
        assert grid.settings("long", method).keys() <= known, method


def test_a_measured_number_is_compared_with_that_of_another_method_by_seed(grid: Grid) -> None:
    for method, shares in (("start", (0.2, 0.3)), ("gspo-final", (0.6, 0.8))):
        for run in grid.tuning("formats", method):
            grid.add({"key": run.key, "accuracy": 0.5})
        for run, share in zip(grid.runs("formats", "formats", method), shares, strict=False):
            grid.add({"key": run.key, "accuracy": 0.5, "measured": {"largest": share}, "right": ""})
    line = next(one for one in summarise.lines_of(grid) if one.claim.get("value") == "largest")
    assert line.found is not None
    assert line.found.value == pytest.approx(0.45)
    assert line.found.count == 2
    assert "| gspo-final | 0.70 ± 0.14 |" in summarise.measured_table(grid, "formats", ["largest"])


@pytest.mark.parametrize(
    ("rule", "low", "high", "wanted"),
    [
        ("better", 0.01, 0.05, "held"),
        ("better", -0.01, 0.05, "inconclusive"),
        ("better", -0.01, 0.03, "not held"),  # the claimed 0.036 is excluded
        ("as good", -0.02, 0.05, "held"),
        ("as good", -0.05, 0.05, "inconclusive"),
        ("as good", -0.05, -0.01, "not held"),
        ("within", 0.72, 0.9, "held"),
        ("within", 0.6, 0.9, "inconclusive"),
        ("within", 0.1, 0.6, "not held"),
    ],
)
def test_verdicts_follow_from_intervals(rule: str, low: float, high: float, wanted: str) -> None:
    found = summarise.Estimate((low + high) / 2, low, high, 0.01, 0.03, 5)
    claim: dict[str, Any] = {"by": 0.036, "margin": 0.03, "low": 0.7, "high": 0.95}
    assert summarise.verdict(rule, found, 0.01, claim) == wanted
    if wanted == "held" and rule == "better":
        assert summarise.verdict(rule, found, 0.2, claim) == "inconclusive"  # one of many comparisons


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_planted_difference_of_five_points_is_found_at_the_stated_power(seeds: int) -> None:
    """Studies of two methods on the same 256 problems, with as much noise between seeds as makes 5 points detectable.

    Of 2,000 studies, 0.03 is three standard errors of the power and six of the level.
    """
    rng = np.random.default_rng(0)
    skill = rng.uniform(0.2, 0.8, size=256)  # chance of a right sample, by problem
    sampling = float(np.mean(skill * (1 - skill))) / (8 * 256)
    noise = ((0.05 / summarise.detectable(1.0, seeds)) ** 2 / 2 - sampling) ** 0.5

    def accuracy(planted: float) -> dict[int, dict[str, float]]:
        chances = np.clip(skill + planted + rng.normal(0, noise, size=(seeds, 1)), 0, 1)
        right = rng.binomial(8, chances).mean(axis=1) / 8
        return {seed: {"accuracy": float(one)} for seed, one in enumerate(right)}

    for planted, wanted in ((0.0, 0.05), (0.05, 0.8)):
        found = [summarise.difference(accuracy(planted), accuracy(0.0)) for _ in range(2000)]
        rejected = sum(one is not None and one.p_value < 0.05 for one in found) / len(found)
        assert rejected == pytest.approx(wanted, abs=0.03)
