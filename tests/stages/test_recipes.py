"""The shipped recipes: each can be read, planned and, by the commands in its head, made ready."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ssrctl import cli
from ssrctl.configs import EvalConfig, TrainConfig, build_config
from ssrctl.io.artifacts import ModelIdentity, save_mask
from ssrctl.io.package_data import profile_path, shipped_names
from ssrctl.stages import train

ALL = shipped_names("recipes", ".yaml")
NAMES = [name for name in ALL if name != "aime"]  # of training
# The bundled reasoner's chat template has no system message.
ON_TINY = ("--model", "tiny-reasoner", "--dataset", "tiny-arithmetic", "--limit", "8", "--system-prompt", "")


def recipe(name: str) -> Path:
    return profile_path("recipes", name, ".yaml")


def settings(name: str, *more: Path) -> TrainConfig:
    return build_config(TrainConfig, {}, recipe(name), *more)


def test_the_recipes_of_the_papers_ship() -> None:
    ssr = {"ssr-kronos", "ssr-adam", "gspo-final", "gspo-cot"}
    assert set(NAMES) == ssr | {"random-1pct", "subnetwork", "principal", "non-principal", "safe"}
    for name in ssr:
        made = settings(name)
        assert (made.model, made.dataset) == ("Qwen/Qwen3-1.7B", "zwhe99/DeepMath-103K")
        assert (made.temperature, made.questions_per_step, made.num_generations, made.max_steps) == (0.7, 4, 8, 800)
        assert (made.critic == "llm") is (name != "gspo-final")
        assert made.resolved_learning_rate == (3e-2 if name == "ssr-kronos" else 5e-6)
    assert (settings("ssr-kronos").budget, settings("ssr-kronos").max_step_budget) == (0.05, 0.01)
    assert settings("random-1pct").system_prompt.endswith(r"within \boxed{}")
    for name in set(NAMES) - ssr:
        assert settings(name).mask == Path(f"{name}.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_says_what_it_follows_and_where_it_differs(name: str) -> None:
    head = recipe(name).read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r'^# Follows "[^"]+": .*\btable \d', head.replace("\n# ", " "), re.MULTILINE), head
    assert "# Differs: " in head


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small mask of the bundled reasoner under each name that a recipe asks for."""
    import torch

    from ssrctl.configs import ModelConfig
    from ssrctl.core.mask import BlockMask
    from ssrctl.models.loading import load_model

    folder = tmp_path_factory.mktemp("recipes")
    loaded = load_model(ModelConfig())
    shapes = loaded.shapes()
    mask = BlockMask.from_indices(shapes, {next(iter(shapes)): torch.arange(100)})
    for name in ("superweights", *NAMES):
        identity = ModelIdentity(name="tiny", revision=None, fingerprint=loaded.identity.fingerprint)
        save_mask(folder / f"{name}.safetensors", mask, mask_kind="random", model=identity, settings={})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_planned(
    name: str, masks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(masks)
    monkeypatch.setattr(train, "memory_facts", lambda *_: {})  # two seconds, tested elsewhere
    flags = ["--budget-profile", "tiny-reasoner"] if name == "ssr-kronos" else []
    assert cli.main(["train", "--recipe", name, *ON_TINY, *flags, "--dry-run", "--json"]) == 0
    made = settings(name)
    shown = capsys.readouterr().out
    assert f'"learning_rate": {made.resolved_learning_rate}' in shown
    assert f'"responses": {made.max_steps * made.questions_per_step * made.num_generations}' in shown
    assert f'"trained": {421_248 if made.mask is None else 100}' in shown
    assert f'"protected": {0 if made.protect is None else 100}' in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gspo-final", "gspo-cot"}))
def test_the_commands_in_the_head_of_a_recipe_make_what_it_needs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = recipe(name).read_text().replace("\\\n#", "").partition("\n\n")[0]
    commands = re.findall(r"^#   ssrctl (.*)", head, re.MULTILINE)
    assert commands
    made = settings(name)
    Path("full.yaml").write_text("mask:\n")  # as the head of subnetwork writes it
    for command in commands:
        words = [{made.model: "tiny-reasoner", made.dataset: "tiny-arithmetic"}.get(w, w) for w in shlex.split(command)]
        if words[0] == "train":
            words += [*ON_TINY, "--max-steps", "2", "--questions-per-step", "8", "--max-new-tokens", "64"]
        if words[0] == "profile-budget":
            words += ["--num-problems", "2"]
        assert cli.main(words) == 0, command
    assert cli.main(["train", "--recipe", name, *ON_TINY, "--dry-run"]) == 0


def test_files_and_flags_win_over_a_recipe_and_the_result_can_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, saved = tmp_path / "own.yaml", tmp_path / "new" / "saved.yaml"
    own.write_text("mask:\nmax-steps: 7\nseed: 1\n")
    words = ["train", "--recipe", "random-1pct", "--config", str(own), "--seed", "2", "--save-config", str(saved)]
    assert cli.main(words) == 0
    assert capsys.readouterr().err == f"settings -> {saved}\n"
    made = build_config(TrainConfig, {}, saved)
    assert made == build_config(TrainConfig, {"seed": 2}, recipe("random-1pct"), own)
    assert (made.mask, made.max_steps, made.seed, made.num_generations) == (None, 7, 2, 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--recipe", "ssr"], "error: recipe 'ssr' is neither a file nor one that ships\n  fix: shipped: aime, gspo-cot,"),
        (["train", "--recipe", "wrong.yaml"], "error: wrong.yaml: unknown key 'learning_rat'\n  fix: did you mean 'learning_rate'?\n"),
        (["train", "--recipe", "principal", *ON_TINY], "error: --mask principal.safetensors not found\n  fix: make it with"),
        (["recipes", "ssr"], "error: recipe 'ssr' is neither a file nor one that ships"),
        (["eval", "--recipe", "safe"], "safe.yaml: unknown key 'max_steps'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("learning_rat: 1\n")
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    rows: dict[str, Any] = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ALL and rows["safe"] == "The safe mask: weights that are non-principal or small."
    assert cli.main(["recipes", "safe"]) == 0
    assert capsys.readouterr().out == recipe("safe").read_text()


def test_the_recipe_of_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = build_config(EvalConfig, {}, recipe("aime"))
    assert (made.dataset, made.temperature, made.num_samples, made.runs) == ("di-zhang-fdu/AIME_1983_2024", 0.7, 1, 3)
    words = ["eval", "--recipe", "aime", "-o", str(tmp_path / "out"), "--json"]
    assert cli.main([*words, *ON_TINY, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 8 * 3
    rows = [
        {"id": f"1983-{k}/{run}", "question": f"{k}+0?", "answer": str(k), "response": f"#### {k + (run == 2)}"}
        for k in range(4)
        for run in range(3)
    ]
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main([*words, "--responses", str(responses)]) == 0  # without the data set, whose answers it has
    captured = capsys.readouterr()
    assert json.loads(captured.out)["runs"]["accuracies"] == [1, 1, 0]
    assert "note: of the file's settings temperature, max_new_tokens" in captured.err
    assert cli.main([*words, "--responses", str(responses), "--temperature", "0.5"]) == 2
    assert "--temperature would have no effect" in capsys.readouterr().err
    responses.write_text(json.dumps(rows[0]) + "\n")
    assert cli.main([*words, "--responses", str(responses)]) == 2
    assert "3 runs need the ids PROBLEM/0" in capsys.readouterr().err
