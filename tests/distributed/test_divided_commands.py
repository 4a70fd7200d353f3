"""Commands whose work is divided among processes: the artifacts of one process, byte for byte."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from processes import run_processes
from test_slow_processes import launched

from ssrctl.cli import main
from ssrctl.errors import UserError

pytestmark = pytest.mark.slow
CRITIC = [
    "critic",
    "--critic",
    "rollout",
    "--critic-rollouts",
    "2",
    "--max-new-tokens",
    "32",
    "--sampling-batch-size",
    "2",
]
PROFILE = [
    "profile-budget",
    "--num-problems",
    "3",
    "--num-generations",
    "4",
    "--max-new-tokens",
    "24",
    "--max-steps",
    "2",
]
SUPERWEIGHTS = [
    "superweights",
    "--method",
    "both",
    "--fraction",
    "0.01",
    "--num-subsets",
    "3",
    "--spike-threshold",
    "3",
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("words", "name"), [(PROFILE, "b.json"), (SUPERWEIGHTS, "s.safetensors")], ids=["profile", "superweights"]
)
def test_the_artifacts_are_those_of_one_process(words: list[str], name: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert main([*words, "--json", "-o", str(tmp_path / "1" / name)]) == 0
    ended = run_processes([*words, "--json", "-o", str(tmp_path / "2" / name)], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) == 2
    assert json.loads(ended[0].out) and ended[1].out == ended[1].err == ""


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Six responses to two questions, several windows of the rollout critic."""
    rows = [
        {"id": f"{place}/{number}", "question": question, "prompt": f"{question}\n", "answer": answer, "response": said}
        for place, (question, answer) in enumerate([("7*3+2=?", "23"), ("48*6-2=?", "86")])
        for number, said in enumerate(["7*3=21\n21+2=23\n####23", "48*6=88\n88-2=87\n####87", "7*3=22\n"])
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["segment", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "steps.jsonl")]) == 0
    return tmp_path / "steps.jsonl"


def test_the_rollout_critic_gives_the_scores_of_one_process(steps: Path, tmp_path: Path, capfd) -> None:
    """From the start, and with rows that are there already."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    words = [*CRITIC, str(steps), "--json"]
    assert main([*words, "-o", str(one)]) == 0
    summary = json.loads(capfd.readouterr().out)
    ended = run_processes([*words, "-o", str(two)], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    assert json.loads(ended[0].out) == summary and summary["prefixes"] > 8 and ended[1].out == ended[1].err == ""
    assert one.read_bytes() == two.read_bytes()
    two.write_text("".join(one.read_text().splitlines(keepends=True)[:2]))
    ended = run_processes([*words, "-o", str(two)], 2, tmp_path / "logs")
    assert json.loads(ended[0].out)["kept_from_before"] == 2 and one.read_bytes() == two.read_bytes()


def test_other_critics_score_in_the_first_process(steps: Path, tmp_path: Path) -> None:
    ended = run_processes(["critic", str(steps), "-o", str(tmp_path / "scored.jsonl")], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0] and ended[1].err == "" and "scored" in ended[0].err
    assert main(["critic", str(steps), "--num-processes", "2"]) == 2


def test_an_error_in_another_process_is_one_line(steps: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        from ssrctl.critics.rollout import RolloutCritic

        def fails(self: object, job: object) -> object:
            raise UserError(f"process {rank} cannot")

        if rank == 1:
            RolloutCritic.estimate = fails  # type: ignore[assignment, method-assign]

    ended = run_processes([*CRITIC, str(steps), "-o", str(tmp_path / "out.jsonl")], 2, tmp_path / "logs", before)
    assert [process.code for process in ended] == [2, 1], ended  # the second one lost the first
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert said == ["error: process 1 cannot"]


def test_find_lr_tries_the_rates_of_one_process(tmp_path: Path, capfd) -> None:
    """Also where a rate breaks the weights: every process then goes on to the next."""
    words = ["train", "--find-lr", "--find-lr-steps", "2", "--questions-per-step", "3", "--num-generations", "2",
             "--max-new-tokens", "16", "--learning-rate", "1e15", "--max-grad-norm", "0", "--json"]  # fmt: skip
    assert main([*words, "--sample-together", "question", "-o", str(tmp_path / "one")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {rate["broke"] for rate in found["rates"]} == {True, False}
    ended = run_processes([*words, "-o", str(tmp_path / "two")], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    assert json.loads(ended[0].out) == found and ended[1].err == ""


def test_sigterm_breaks_off_the_jobs_and_keeps_the_results(tmp_path: Path) -> None:
    samples = tmp_path / "eval" / "samples.jsonl"
    words = [
        "--num-samples",
        "64",
        "--max-new-tokens",
        "48",
        "--sampling-batch-size",
        "2",
        "-o",
        str(tmp_path / "eval"),
    ]
    process = launched(["ssrctl", "eval", "--num-processes", "2", *words])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (samples.is_file() and samples.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert process.returncode == 3 and "Traceback" not in err, err
    assert said == [f"stopped: SIGTERM: the samples drawn so far are kept in {samples}"]
    assert [json.loads(line)["id"] for line in samples.read_text().splitlines()]
