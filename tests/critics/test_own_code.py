"""Critics and rewards that users bring: found by name, checked, and blamed for their mistakes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssrctl import CriticOptions, Rollout, TrainConfig, UserError, cli, make_critic, score_all, train
from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import build_config
from ssrctl.errors import Stopped
from ssrctl.text.segment import segment

MODULE = """
from ssrctl import ResponseCritic, Stopped, missing, scored

class Fine(ResponseCritic):
    def score(self, rollout):
        return ([80.0, None, missing("mine"), scored(10.0, "step", "why"), 400] * 9)[: len(rollout.steps)]

class Short(Fine):
    def score(self, rollout):
        return super().score(rollout)[1:]

class Raises(Fine):
    def score(self, rollout):
        raise RuntimeError("no\\nluck")

class Limit(Fine):
    def score(self, rollout):
        raise Stopped("my own limit", "wait")

class Plain:  # derives from nothing
    identity = "plain 1"
    def stream(self, rollouts):
        for rollout in rollouts:
            yield rollout, [scored(1.0, "step") for _ in rollout.steps]

class Lazy(Plain):
    def stream(self, rollouts):
        yield from list(super().stream(rollouts))[1:]

class Twice(Plain):
    def stream(self, rollouts):
        for found in super().stream(rollouts):
            yield found
            yield found

class Numbers(Plain):
    def stream(self, rollouts):
        for rollout in rollouts:
            yield rollout, [1.0 for _ in rollout.steps]

class Picky(Fine):
    def __init__(self):
        raise KeyError("MY_KEY")

class NoCritic:
    pass

class Later(Plain):  # begins to fail when the file is there
    def stream(self, rollouts):
        import pathlib
        for number, found in enumerate(super().stream(rollouts)):
            if number == 2 and pathlib.Path("broken").exists():
                raise OSError("the disk of the critic is full")
            yield found

def reward(completions, answer, **columns):
    return [float(len(text) % 3) for text in completions]

text = "no function"
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module ``own_parts``, as the current one."""
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_parts", None)


def rollouts(count: int = 1) -> list[Rollout]:
    text = "a=1\nb=2\nc=3\nd=4\ne=5"
    return [Rollout(id=f"q/{number}", question="?", response=text, steps=segment(text)) for number in range(count)]


def named(name: str) -> Any:
    return make_critic(CriticOptions(critic=f"own_parts:{name}"))


def test_a_score_is_a_number_a_record_or_missing() -> None:
    (scores,) = score_all(named("Fine"), rollouts())
    assert [score.reward for score in scores] == [0.8, None, None, 0.1, None]
    assert [score.error for score in scores] == [None, "not_judged", "mine", None, "out_of_range"]
    assert named("Fine").identity is None and named("Fine").summary() == {}


def test_a_class_that_derives_from_nothing_needs_only_a_stream() -> None:
    critic = named("Plain")
    assert critic.identity == "plain 1" and critic.summary() == {}
    assert [len(scores) for scores in score_all(critic, rollouts(3))] == [5, 5, 5]
    critic.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Short", r"own_parts:Short raised ValueError: 4 scores for the 5 steps of q/0$"),
        ("Raises", r"own_parts:Raises raised RuntimeError: no luck \(own_parts.py, line 14\)"),
        ("Limit", r"^my own limit"),
        ("Lazy", r"own_parts:Lazy left out 1 responses, the first is q/0"),
        ("Twice", r"own_parts:Twice yielded a response that it was not given, or one twice"),
        ("Numbers", r"own_parts:Numbers gave a float as a score of q/0, not a StepScore"),
    ],
)
def test_mistakes_of_a_critic_stop_the_work_and_name_it(name: str, said: str) -> None:
    with pytest.raises(Stopped) as raised:
        score_all(named(name), rollouts(2))
    assert re.search(said, raised.value.message)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--critic", "own_parts:Nothing"],
            "the critic own_parts:Nothing raised AttributeError: module 'own_parts' has no",
        ),
        (
            ["--critic", "no_parts:Fine"],
            "the critic no_parts:Fine raised ModuleNotFoundError: No module named 'no_parts'\n",
        ),
        (["--critic", "broken_parts:Fine"], "raised SyntaxError: invalid syntax (broken_parts.py, line 1)\n"),
        (["--reward", "script:main"], "the reward script:main raised SystemExit: 3 (script.py, line 1)\n"),
        (["--critic", "rollot"], "--critic: 'rollot' is not known\n  fix: did you mean 'rollout'?"),
        (["--critic", "own parts:Fine"], "--critic: 'own parts:Fine' is not known"),
        (["--reward", "own_parts:nothing"], "the reward own_parts:nothing raised AttributeError"),
        (["--reward", "own_parts:text"], "the reward own_parts:text is a str, not a function"),
        (["--reward", "reward"], "--reward: 'reward' is not known"),
    ],
)
def test_names_that_lead_nowhere_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken_parts.py").write_text("class:\n")
    Path("script.py").write_text("raise SystemExit(3)\n")
    assert cli.main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 2, "before any model is loaded"


@pytest.mark.parametrize(
    ("name", "said"), [("Picky", "raised KeyError: 'MY_KEY'"), ("NoCritic", "has no method 'stream'")]
)
def test_a_critic_that_cannot_be_made(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"own_parts:{name} {said}"):
        named(name)


def test_a_file_does_not_decide_which_code_is_imported(own: Path) -> None:
    path = own / "run.yaml"
    path.write_text("critic: own_parts:Fine\nreward: [own_parts:reward]\n")
    with pytest.raises(UserError, match="--critic own_parts:Fine comes from a file"):
        build_config(TrainConfig, {}, path)
    with pytest.raises(UserError, match="--reward own_parts:reward comes from a file"):
        build_config(TrainConfig, {"critic": "own_parts:Fine"}, path)
    made = build_config(TrainConfig, {"critic": "own_parts:Fine", "reward": ["own_parts:reward"]}, path)
    assert made.reward == ["own_parts:reward"] and "own_parts" not in sys.modules


def test_installed_packages_offer_parts_by_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own / "own_parts-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own-parts\nVersion: 1\n")
    points = "[ssrctl.critics]\nfine = own_parts:Fine\n[ssrctl.rewards]\nmine = own_parts:reward\n"
    (folder / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(own))
    path = own / "run.yaml"
    path.write_text("critic: fine\nreward: [mine]\n")
    made = build_config(TrainConfig, {}, path)
    assert score_all(make_critic(made), rollouts())[0][0].reward == 0.8
    with pytest.raises(UserError, match=r"did you mean 'fine'"):
        CriticOptions(critic="fin")


def test_ssrctl_critic_keeps_what_an_own_critic_has_scored(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rollout.to_dict() for rollout in rollouts(4)]
    Path("steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("broken").touch()
    words = ["critic", "steps.jsonl", "--critic", "own_parts:Later", "-o", "scored.jsonl"]
    assert cli.main(words) == 3
    err = capsys.readouterr().err
    assert "stopped: the critic own_parts:Later raised OSError: the disk of the critic is full (own_parts.py" in err
    assert "2 responses are scored and kept" in err and not Path("scored.jsonl").exists()
    Path("broken").unlink()
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_from_before"] == 2
    assert len(Path("scored.jsonl").read_text().splitlines()) == 4


SMALL = {"questions_per_step": 1, "num_generations": 2, "max_new_tokens": 48, "budget_profile": "flat"}


def test_a_run_whose_critic_fails_keeps_its_last_whole_step(own: Path) -> None:
    from ssrctl import ResponseCritic

    class Fails(ResponseCritic):
        left = 2

        def score(self, rollout: Rollout) -> list[float]:
            self.left -= 1
            if self.left < 0:
                raise ValueError("enough")
            return [float(self.left) for _ in rollout.steps or ()]

    with pytest.raises(Stopped, match="Fails raised ValueError: enough") as raised:
        train(TrainConfig(output_dir=own / "run", max_steps=3, **SMALL), critic=Fails())
    assert "to continue after step 1: ssrctl train --config" in raised.value.remedy
    assert raised.value.remedy.endswith(f"--resume-from-checkpoint latest --critic {__name__}:Fails")
    run = RunDir(own / "run")
    assert [path.name for path in run.checkpoints()] == ["000001"] and run.read_config()["critic"].endswith(":Fails")


def test_own_parts_are_the_run_of_the_same_names(own: Path) -> None:
    """Objects from Python and names on the command line train alike; a run with own parts resumes."""
    words = ["--max-steps", "1", "--questions-per-step", "1", "--num-generations", "2", "--max-new-tokens", "48"]
    words += ["--budget-profile", "flat", "--output-dir", "cli", "--critic", "own_parts:Fine"]
    words += ["--reward", "own_parts:reward"]
    assert cli.main(["train", *words]) == 0
    import own_parts

    config = TrainConfig(output_dir=own / "api", max_steps=1, **SMALL)
    train(config, critic=own_parts.Fine(), rewards=[own_parts.reward])
    ours, theirs = (path.joinpath("rollouts/000001.jsonl").read_text() for path in (own / "cli", own / "api"))
    assert ours == theirs
    for row in map(json.loads, ours.splitlines()):
        assert row["scores"][-1]["reward"] == len(row["response"]) % 3
    resume = ["train", "--config", "cli/config.yaml", "--output-dir", "cli", "--resume-from-checkpoint", "latest"]
    assert cli.main([*resume, "--max-steps", "2"]) == 2
    assert cli.main([*resume, "--max-steps", "2", *words[-4:]]) == 0
