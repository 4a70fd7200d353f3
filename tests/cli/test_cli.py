"""The command line: flags, yaml, errors and exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.main import get_command

from ssrctl import __version__, cli, configs
from ssrctl.checkpoints.delta import Delta, save_delta
from ssrctl.cli import app as app_module
from ssrctl.cli import glue
from ssrctl.configs import building
from ssrctl.configs.layers import layer_ranges
from ssrctl.configs.names import accepted_names
from ssrctl.core.mask import BlockMask
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, save_mask

COMMANDS = {
    "superweights": configs.SuperweightsConfig,
    "profile-budget": configs.ProfileBudgetConfig,
    "segment": configs.SegmentConfig,
    "critic": configs.CriticConfig,
    "train": configs.TrainConfig,
    "eval": configs.EvalConfig,
    "diagnose": configs.DiagnoseConfig,
    "serve-rollouts": configs.ServeRolloutsConfig,
    "report": configs.ReportConfig,
    "doctor": configs.DoctorConfig,
    "push": configs.PushConfig,
    "recipes": configs.RecipesConfig,
    "delta diff": configs.DeltaDiffConfig,
    "delta apply": configs.DeltaApplyConfig,
    "delta info": configs.DeltaInfoConfig,
    "mask random": configs.MaskRandomConfig,
    "mask principal": configs.MaskPrincipalConfig,
    "mask low-magnitude": configs.MaskLowMagnitudeConfig,
    "mask diff": configs.MaskDiffConfig,
    "mask layers": configs.MaskLayersConfig,
    "mask union": configs.MaskUnionConfig,
    "mask intersect": configs.MaskIntersectConfig,
    "mask minus": configs.MaskMinusConfig,
    "mask complement": configs.MaskComplementConfig,
    "mask compare": configs.MaskCompareConfig,
    "mask info": configs.MaskInfoConfig,
}


def one_line(text: str) -> str:
    """Without box drawing, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# --------------------------------------------------------------------------------------------------
# help


def test_every_command_is_known_here() -> None:
    found = set()
    for name, one in get_command(app_module.app).commands.items():  # type: ignore[attr-defined]
        found |= {f"{name} {inner}" for inner in one.commands} if hasattr(one, "commands") else {name}
    assert found == {*COMMANDS, "env"}, "the other name of doctor"


def leaf(name: str) -> Any:
    """The command of typer by its name."""
    found: Any = get_command(app_module.app)
    for word in name.split():
        found = found.commands[word]
    return found


def shown_help(name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_a_flag_with_its_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = one_line(shown_help(name, 400, capsys, monkeypatch))
    for spec in dataclasses.fields(COMMANDS[name]):
        assert glue.help_text(COMMANDS[name], spec.name) in shown, spec.name
    assert "--config" in shown
    assert (COMMANDS[name].__doc__ or "-").splitlines()[0] in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_is_cut_off_in_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = shown_help(name, 80, capsys, monkeypatch)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    flags = [flag for one in leaf(name).params for flag in one.opts if flag.startswith("-")]
    assert flags
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag
    for spec in dataclasses.fields(COMMANDS[name]):
        for choice in typing.get_args(building.field_types(COMMANDS[name])[spec.name]):
            assert not isinstance(choice, str) or re.search(rf"\b{choice}\b", shown), choice


def test_flags_stand_in_panels_that_begin_with_the_common_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panels(name: str) -> list[str]:
        return re.findall(r"^╭─ (\w+) ", shown_help(name, 100, capsys, monkeypatch), re.MULTILINE)

    parts = ["Method", "Optimizer", "Sampling", "Engine", "Segmentation", "Critic"]
    parts += ["Checkpoints", "Logging", "Processes", "Hub"]
    assert panels("train") == ["Options", "Model", "Data", "Prompt", *parts]
    assert panels("critic") == ["Arguments", "Options", "Critic", "Model", "Prompt", "Sampling", "Engine", "Processes"]


def test_help_names_choices_and_ranges_that_the_doc_line_leaves_out() -> None:
    assert glue.help_text(configs.TrainConfig, "dtype").endswith("One of auto, stored, float32, bfloat16, float16.")
    assert glue.help_text(configs.TrainConfig, "clip_epsilon").endswith("Between 0 and 1.")
    assert "One of" not in glue.help_text(configs.TrainConfig, "scope")
    assert glue.help_text(configs.TrainConfig, "critic_show_reference").startswith("Do not show")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_a_valid_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(leaf(name).epilog.removeprefix("Example: "))
    assert program == "ssrctl" and " ".join(words).startswith(name)
    made: list[Any] = []
    monkeypatch.setattr(glue, "stage_function", lambda stage: made.append)
    assert cli.main(words) == 0
    assert [type(one) for one in made] == [COMMANDS[name]]


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from ssrctl.cli import main; main(['train', '--help'])\n"
        "print('loaded', *{'torch', 'transformers', 'numpy', 'yaml', 'ssrctl.stages'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_showing_a_file_needs_no_torch(tmp_path: Path) -> None:
    model = ModelIdentity(name="m", revision=None, fingerprint="xxh3:0")
    mask = BlockMask.from_dense({"w": torch.arange(600).view(20, 30) % 7 == 0})
    values, before = torch.ones(2), torch.zeros(2)
    for small in (True, False):
        save_mask(tmp_path / f"mask{small}", mask, mask_kind="random", model=model, settings={}, small=small)
        changes = {"w": (torch.tensor([3, 9]), values)}
        delta = Delta(model, {"w": (20, 30), "v": (5,)}, changes, {"w": before} if small else None)
        save_delta(tmp_path / f"delta{small}.safetensors", delta)
    calls = [[what, "info", str(file)] for what in ("mask", "delta") for file in sorted(tmp_path.glob(f"{what}*"))]
    calls += [["recipes"], ["recipes", "safe"], ["diagnose", "--help"], ["--help"]]
    code = f"import sys; sys.modules['torch'] = None; from ssrctl.cli import main; print([main(c) for c in {calls}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == str([0] * 8), done.stderr
    assert done.stdout.count("86 of 600 weights selected") == 2
    assert done.stdout.count("2 of 605 coordinates changed") == 2


def test_the_shell_completes_flags() -> None:
    asked = {"_SSRCTL_COMPLETE": "complete_bash", "COMP_WORDS": "ssrctl train --critic-bud", "COMP_CWORD": "2"}
    code = "from ssrctl.cli import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=os.environ | asked
    )
    assert done.stdout.split() == ["--critic-budget-usd"]


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssrctl {__version__}\n"
    cli.main([])
    assert "profile-budget" in "".join(capsys.readouterr())


# --------------------------------------------------------------------------------------------------
# from flags and yaml to a config


@dataclasses.dataclass(kw_only=True)
class Settings(configs.CommonConfig):
    """A command for these tests.

    Example: ssrctl try x
    """

    input: str = building.positional(metavar="INPUT")
    """What to read."""

    output: str = building.output("-")
    """Where to write."""

    num_things: building.AtLeastOne = 3
    """How many."""

    rate: float | None = None
    """How fast."""

    mode: str = "plain"
    """Which way."""

    quiet: bool = False
    """Say less."""

    careful: bool = True
    """Look twice."""


ran: list[Settings] = []


def stage(config: Settings) -> dict[str, Any] | None:
    """What the command runs; the mode chooses how it ends."""
    ran.append(config)
    if config.mode == "user":
        raise UserError("[bold]odd[/bold] thing", "mend it")
    if config.mode == "interrupt":
        raise KeyboardInterrupt
    if config.mode == "crash":
        raise ZeroDivisionError("a bug")
    return None if config.mode == "silent" else {"n": config.num_things, "text": "ü"}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``ssrctl.cli.main`` with a command ``try`` that runs ``stage`` above."""
    made = typer.Typer(pretty_exceptions_enable=False)
    made.callback()(lambda: None)
    monkeypatch.setitem(sys.modules, "stage_of_test_cli", sys.modules[__name__])
    glue.command(made, "try", Settings, "stage_of_test_cli:stage")
    monkeypatch.setattr(app_module, "app", made)
    ran.clear()
    return cli.main


def test_flags_reach_the_stage(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "in.jsonl", "-o", "out", "--num-things", "5", "--rate", "0.5"]) == 0
    assert ran == [Settings(input="in.jsonl", output="out", num_things=5, rate=0.5)]
    assert capsys.readouterr().out == "", "without --json nothing goes to stdout"


def test_underscores_are_accepted_in_flags_alone(main: Any) -> None:
    assert main(["try", "in_put", "--num_things=7", "--dry_run", "--mode", "a_b"]) == 0
    assert ran == [Settings(input="in_put", num_things=7, dry_run=True, mode="a_b")]
    words = ["--num_things=c_d", "x_y", "--odd_one", "-o", "--", "--num_things"]
    assert glue.current_words(Settings, words) == (
        ["--num-things=c_d", "x_y", "--odd-one", "-o", "--", "--num_things"],
        {},
    )


def test_a_switch_has_a_flag_for_the_value_that_is_not_its_default(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["try", "x", "--quiet", "--no-careful"]) == 0
    assert (ran[-1].quiet, ran[-1].careful) == (True, False)
    (tmp_path / "run.yaml").write_text("quiet: true\ncareful: false\n")
    assert main(["try", "x", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (ran[-1].quiet, ran[-1].careful) == (True, False)
    assert capsys.readouterr().err == ""
    # the other form still wins over a file
    assert main(["try", "x", "--config", str(tmp_path / "run.yaml"), "--no-quiet", "--careful"]) == 0
    assert (ran[-1].quiet, ran[-1].careful) == (False, True)
    assert capsys.readouterr().err == ""


def test_a_wrong_flag_names_the_nearest(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "x", "--num-thing", "3"]) == 2
    said = one_line(capsys.readouterr().err)
    assert re.search(r"No such option:? '?--num-thing\b", said) and re.search(r"--num-things\b", said)
    assert main(["try", "x", "y"]) == 2
    assert "unexpected extra argument" in one_line(capsys.readouterr().err) and ran == []


def test_json_goes_to_stdout(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 3, "text": "ü"}
    assert main(["try", "x", "--json", "--mode", "silent"]) == 0
    assert capsys.readouterr().out == ""


def test_yaml_lies_under_flags(main: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("input: from-yaml\nnum-things: 8\nrate: 2\nmode: other\n")
    assert main(["try", "--config", str(path), "--num-things", "3", "--mode", "plain"]) == 0
    # 3 and plain are the defaults too: given as flags, they still win
    assert ran == [Settings(input="from-yaml", num_things=3, rate=2.0, mode="plain")]
    path.write_text("num_things: 9\n")
    assert main(["try", "x", "--config", str(path)]) == 0
    assert ran[-1].num_things == 9
    path.write_text("# nothing\n")
    assert main(["try", "x", "--config", str(path)]) == 0
    assert ran[-1] == Settings(input="x")


@pytest.mark.parametrize(
    ("yaml", "message", "fix"),
    [
        ("num_thing: 3", "unknown key 'num_thing'", "did you mean 'num_things'?"),
        ("zzz: 3", "unknown key 'zzz'", "known keys: "),
        ("[1, 2]", "expected a mapping of settings, found list", ""),
        ("a: [", "not valid yaml", ""),
        ("num_things: many", "--num-things: ", "got 'many'"),
        ("num_things: 1.5", "--num-things: ", "got 1.5"),
        ("num_things: 0", "--num-things must be at least 1, got 0", ""),
        ("num_things:", "'num_things' is needed", "give --num-things"),
        ("rate: [1]", "--rate: ", "got [1]"),
        ("json: perhaps", "--json: ", "got 'perhaps'"),
    ],
)
def test_bad_yaml_is_a_user_error(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, message: str, fix: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml)
    assert main(["try", "x", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr()
    assert message in said.err and fix in said.err
    assert said.out == "" and "Traceback" not in said.err
    assert ran == []


def test_a_missing_config_file(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "x", "--config", "absent.yaml"]) == 2
    assert "config file not found: absent.yaml" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# how commands end


def test_exit_codes(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "x", "--mode", "user"]) == 2
    assert capsys.readouterr().err == "error: [bold]odd[/bold] thing\n  fix: mend it\n"
    assert main(["try", "x", "--mode", "interrupt"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    assert main(["try", "x", "--num-things", "0"]) == 2
    assert main(["try", "x", "--num-things", "many"]) == 2
    assert main(["try", "x", "--colour", "red"]) == 2
    assert main(["try"]) == 2
    assert "'input' is needed" in capsys.readouterr().err
    assert main(["no-such-command"]) == 2


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "ssrctl", *words], input=stdin, capture_output=True, timeout=120, check=False
    )


ROW = json.dumps({"id": "q/0", "question": "1+1?", "response": "1+1=2\nso 2\n#### 2"}).encode() + b"\n"


def test_stages_compose_through_pipes() -> None:
    first = run("segment", "-", stdin=ROW)
    assert first.returncode == 0, first.stderr
    second = run("critic", "-", stdin=first.stdout)
    assert second.returncode == 0, second.stderr
    (row,) = [json.loads(line) for line in second.stdout.splitlines()]
    assert row["id"] == "q/0" and len(row["scores"]) == len(row["steps"]) > 0
    wrong = run("critic", "-", stdin=ROW)
    assert wrong.returncode == 2 and wrong.stdout == b""
    assert b"<stdin>:1: field 'steps' is missing" in wrong.stderr and b"ssrctl segment" in wrong.stderr


# --------------------------------------------------------------------------------------------------
# the real configs


def build(kind: Any, **values: Any) -> Any:
    return configs.build_config(kind, values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (configs.TrainConfig, {"temperature": 0}, "--temperature must be above 0"),
        (configs.TrainConfig, {"temperature": float("nan")}, "--temperature must be above 0"),
        (configs.TrainConfig, {"top_p": 0}, "--top-p must be in"),
        (configs.TrainConfig, {"top_p": 1.01}, "--top-p must be in"),
        (configs.TrainConfig, {"num_generations": 1}, "--num-generations must be at least 2"),
        (configs.TrainConfig, {"max_steps": 0}, "--max-steps must be at least 1"),
        (configs.TrainConfig, {"budget": 0}, "--budget must be in"),
        (configs.TrainConfig, {"budget": 1.5}, "--budget must be in"),
        (configs.TrainConfig, {"max_step_budget": 0}, "--max-step-budget must be in"),
        (configs.TrainConfig, {"clip_epsilon": 1}, "--clip-epsilon must be between"),
        (configs.TrainConfig, {"learning_rate": 0}, "--learning-rate must be above 0"),
        (configs.TrainConfig, {"limit": 0}, "--limit must be at least 1"),
        (configs.TrainConfig, {"save_total_limit": 0}, "--save-total-limit must be at least 1"),
        (configs.TrainConfig, {"weight_decay": 0.1}, "no meaning for kronos"),
        (configs.TrainConfig, {"optimizer": "sgd"}, "--optimizer: .*'kronos' or 'adamw'.* got 'sgd'"),
        (configs.TrainConfig, {"critic": "llm"}, "needs a model"),
        (configs.SuperweightsConfig, {"output": "g", "fraction": 1}, "--fraction must be between"),
        (configs.SuperweightsConfig, {"output": "g", "fraction": 0.1, "minimal": True}, "exclude each other"),
        (configs.SuperweightsConfig, {}, "'output' is needed"),
        (configs.ProfileBudgetConfig, {"output": "b", "claim_fraction": 0}, "--claim-fraction must be between"),
        (configs.TrainConfig, {"log_gradients_size": 63}, "--log-gradients-size must be at least 64, got 63"),
        (
            configs.TrainConfig,
            {"critic_input_price": float("inf")},
            "--critic-input-price must be 0 or more and finite",
        ),
        (configs.TrainConfig, {"critic_budget_usd": float("nan")}, "--critic-budget-usd must be above 0 and finite"),
        (configs.CriticConfig, {"input": "x", "critic_budget_usd": 0}, "--budget-usd must be above 0"),
        (configs.CriticConfig, {"input": "x", "wrong_below": -100}, r"--wrong-below must be in \(-100, 100\]"),
        (
            configs.SegmentConfig,
            {"input": "x", "max_segment_chars": 39},
            "--max-segment-chars must be 0 or at least 40",
        ),
        (configs.SegmentConfig, {"input": "x", "max_segments": 0}, "--max-segments must be at least 1"),
        (configs.EvalConfig, {"confidence": 1}, "--confidence must be between"),
        (configs.DiagnoseConfig, {}, "nothing to measure"),
        (configs.DiagnoseConfig, {"paths": ["a", "b"], "series": True}, "at least two checkpoints, got 2 paths"),
        (configs.DiagnoseConfig, {"paths": ["a", "b"], "intervene": "rotate"}, "takes one model, got 2 paths"),
        (configs.DiagnoseConfig, {"paths": ["a"], "intervene": "rotate"}, "--intervene writes a model"),
        (configs.DiagnoseConfig, {"paths": ["a"], "intervene": "rotate", "jaccard": True}, "exclude each other"),
        (configs.DiagnoseConfig, {"paths": ["a", "b"], "jaccard": True}, "one run directory, got 2"),
        (configs.DiagnoseConfig, {"paths": ["a", "b"], "atol": -1}, "--atol must be 0 or more"),
        (configs.MaskRandomConfig, {"model": "m", "output": "o", "density": 0}, "--density must be in"),
        (configs.MaskPrincipalConfig, {"model": "m", "output": "o", "density": 1}, "--density must be between"),
        (configs.MaskPrincipalConfig, {"model": "m", "output": "o", "rank": 1.1}, "--rank must be in"),
        (configs.MaskLowMagnitudeConfig, {"model": "m", "output": "o", "density": 1}, "--density must be between"),
        (
            configs.MaskDiffConfig,
            {"base": "b", "tuned": "t", "output": "o", "bf16_rtol": 0},
            "--bf16-rtol must be above 0",
        ),
        (configs.MaskLayersConfig, {"model": "m", "output": "o"}, "nothing says which weights to take"),
        (configs.MaskLayersConfig, {"model": "m", "output": "o", "layers": "1,"}, "must list layers like 0-3,7"),
        (configs.MaskUnionConfig, {"masks": ["a"], "output": "o"}, "must be two or more masks, got 1"),
        (configs.MaskInfoConfig, {}, "'mask' is needed"),
    ],
)
def test_ranges(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(kind, **values)


def test_a_config_is_checked_however_it_is_made() -> None:
    with pytest.raises(UserError, match="--max-steps must be at least 1, got 0"):
        configs.TrainConfig(max_steps=0)
    made = configs.TrainConfig(output_dir="run", learning_rate=1)  # type: ignore[arg-type]
    assert made.output_dir == Path("run") and isinstance(made.learning_rate, float)
    with pytest.raises(UserError, match="--learning-rate must be above 0, got -1"):
        dataclasses.replace(made, learning_rate=-1)
    with pytest.raises(UserError, match="the llm critic needs a model"):
        configs.CriticOptions(critic="llm")


def test_the_edges_of_ranges_are_fine() -> None:
    made = build(configs.TrainConfig, budget=1, max_step_budget=1, top_p=1, top_k=0, max_grad_norm=0, limit=1)
    assert (made.budget, made.top_p, made.limit) == (1.0, 1.0, 1)
    assert build(configs.DiagnoseConfig, jaccard=True).paths == []
    assert build(configs.DiagnoseConfig, paths=["a", "b"]).paths == [Path("a"), Path("b")]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", [[0]]), ("0-3,7", [[0, 1, 2, 3], [7]]), (" 2 , 4-5", [[2], [4, 5]]), ("3-3", [[3]])],
)
def test_layers_are_numbers_and_ranges(text: str, layers: list[list[int]]) -> None:
    assert [list(one) for one in layer_ranges(text)] == layers


@pytest.mark.parametrize("text", ["", "-1", "1-", "a", "1..2", "1;2", "1,,2", "٣", "1-2-3", "1" * 7, "2-1"])
def test_other_spellings_of_layers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--layers"):
        layer_ranges(text)


# --------------------------------------------------------------------------------------------------
# other names of settings


@pytest.mark.parametrize("kind", list(dict.fromkeys(COMMANDS.values())), ids=lambda kind: kind.__name__)
def test_other_names_lead_to_fields_and_hide_none(kind: Any) -> None:
    fields = {spec.name for spec in dataclasses.fields(kind)}
    accepted = accepted_names(kind)
    assert set(accepted.values()) <= fields and not accepted.keys() & fields


def parsed(monkeypatch: pytest.MonkeyPatch, line: str) -> Any:
    made: list[Any] = []
    monkeypatch.setattr(glue, "stage_function", lambda stage: made.append)
    assert cli.main(shlex.split(line)) == 0
    return made[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --critic_per_step", {"critic_per_step": True}),
        ("critic x --budget-usd 2 --no-cache", {"critic_budget_usd": 2, "critic_cache": False}),
        ("critic x --critic-budget-usd 2 --no-critic-cache", {"critic_budget_usd": 2, "critic_cache": False}),
        ("train --lr 1 --optim adamw", {"learning_rate": 1, "optimizer": "adamw"}),
        ("train --model_name_or_path m --dataset-name d", {"model": "m", "dataset": "d"}),
        ("train --max-steps 3 --max-segments 2", {"max_steps": 3, "max_segments": 2}),
        ("mask random --model m -o x", {"model": "m"}),
    ],
)
def test_other_names_of_flags(
    line: str,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = parsed(monkeypatch, line)
    assert {name: getattr(made, name) for name in expected} == expected
    assert not capsys.readouterr().err


def test_a_mask_command_takes_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a", "b"], ["a", "--model", "b"]):
        assert cli.main(["mask", "random", *words, "-o", "x"]) == 2
        assert "unexpected extra argument" in one_line(capsys.readouterr().err)
    assert cli.main(["mask", "random", "-o", "x"]) == 2
    assert capsys.readouterr().err == "error: 'model' is needed\n  fix: give --model\n"


def test_other_names_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("critic-cache: false\nlr: 2\n")
    made = configs.build_config(configs.TrainConfig, {}, path)
    assert (made.critic_cache, made.learning_rate) == (False, 2.0)
    path.write_text("cache: false\n")
    assert not configs.build_config(configs.CriticConfig, {"input": "x"}, path).critic_cache
    with pytest.raises(UserError, match="unknown key 'cache'"):
        configs.build_config(configs.TrainConfig, {}, path)


def test_learning_rates_by_optimizer() -> None:
    assert build(configs.TrainConfig).resolved_learning_rate == 3e-2
    assert build(configs.TrainConfig, optimizer="adamw").resolved_learning_rate == 1e-4
    assert build(configs.TrainConfig, learning_rate=0.5).resolved_learning_rate == 0.5


def test_the_first_positional_paths_reach_diagnose(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", "one"]) == 2
    assert "one is not a run directory with checkpoints" in capsys.readouterr().err


def test_errors_are_not_markup() -> None:
    stream = io.StringIO()
    before, sys.stderr = sys.stderr, stream
    try:
        glue.say_error("[red]x[/red]", "[y]")
    finally:
        sys.stderr = before
    assert stream.getvalue() == "error: [red]x[/red]\n  fix: [y]\n"


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        (configs.TrainConfig, "trust_remote_code: true", "--trust-remote-code"),
        (configs.EvalConfig, "trust-remote-code: 'yes'", "--trust-remote-code"),
        (configs.ServeRolloutsConfig, "python: ./python", "--python"),
        (configs.ServeRolloutsConfig, "vllm_arg: [--trust-remote-code]", "--vllm-arg"),
        (configs.ServeRolloutsConfig, "command: [rm, -r, x]", "command"),
    ],
)
def test_a_file_does_not_decide_which_code_is_run(kind: Any, text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{named} comes from a file, and decides which code is run"):
        configs.build_config(kind, {}, path)
    name = text.partition(":")[0].replace("-", "_")
    given = {"trust_remote_code": True, "python": "python3", "vllm_arg": [], "command": []}[name]
    assert getattr(configs.build_config(kind, {name: given}, path), name) == given, "the command line wins"
    path.write_text("trust_remote_code: false")
    assert configs.build_config(kind, {}, path).trust_remote_code is False
