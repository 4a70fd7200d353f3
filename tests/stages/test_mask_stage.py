"""`ssrctl mask` from files to files, and what trains with its masks."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.delta import Delta, DeltaFile, save_delta
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.cli import main
from ssrctl.configs import ModelConfig, TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.io.artifacts import ModelIdentity, load_mask, load_mask_for, save_mask
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.stages import train

TINY = "tiny-reasoner"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(model=TINY))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(tiny_reasoner.path() / "model.safetensors")


@pytest.fixture
def tuned(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The bundled reasoner with some weights of two tensors changed, some of them by little."""
    changed = {name: one.clone() for name, one in weights.items()}
    changed[UP].view(-1)[[5, 900, 4000]] += 0.25
    changed[NORM][[0, 7]] += 1e-6
    (tmp_path / "tuned").mkdir()
    save_file(changed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "tuned"


def mask_of(tmp_path: Path, *words: object, name: str = "m.safetensors") -> BlockMask:
    """The mask that a command writes."""
    path = tmp_path / name
    assert main(["mask", *map(str, words), "-o", str(path), "--json"]) == 0
    return load_mask(path)[0]


def out_of(words: list[Any], capfd: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    """Run a command and return what it wrote to stdout and stderr."""
    capfd.readouterr()
    assert main(["mask", *map(str, words)]) == code, capfd.readouterr().err
    return capfd.readouterr()


def selected(mask: BlockMask, name: str) -> set[int]:
    return set(mask.tensors[name].to_indices().tolist())


# --------------------------------------------------------------------------------------------------
# from weights


def test_random_selects_the_share_of_each_tensor(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    mask = mask_of(tmp_path, "random", "--model", TINY, "--density", 0.03, "--seed", 5)
    assert {name: tiles.count() for name, tiles in mask.tensors.items()} == {
        name: round(0.03 * one.numel()) for name, one in weights.items()
    }
    assert selected(mask, UP) == selected(
        mask_of(tmp_path, "random", "--model", TINY, "--density", 0.03, "--seed", 5), UP
    )
    assert selected(mask, UP) != selected(
        mask_of(tmp_path, "random", "--model", TINY, "--density", 0.03, "--seed", 6), UP
    )


def test_random_masks_of_tensors_of_one_shape_are_independent(tmp_path: Path) -> None:
    """The overlap of every two is the hypergeometric one within five standard deviations, never all of it."""
    mask = mask_of(tmp_path, "random", "--model", TINY, "--density", 0.1)
    alike = [name for name in mask.shapes if mask.shapes[name] == mask.shapes[UP]]
    assert len(alike) == 4
    numel = mask.tensors[UP].numel
    count = round(0.1 * numel)
    spread = math.sqrt(count * 0.1 * 0.9 * 0.9)
    for place, one in enumerate(alike):
        for other in alike[:place]:
            shared = len(selected(mask, one) & selected(mask, other))
            assert abs(shared - count * 0.1) < 5 * spread


def test_low_magnitude_selects_the_smallest_of_each_tensor(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    mask = mask_of(tmp_path, "low-magnitude", "--model", TINY, "--density", 0.2, "--exclude", "*.mlp.*")
    for name, one in weights.items():
        order = np.argsort(np.abs(one.double().numpy().ravel()), kind="stable")
        count = 0 if ".mlp." in name else round(0.2 * one.numel())
        assert selected(mask, name) == set(order[:count].tolist())


def test_principal_selects_the_largest_of_each_reconstruction(
    tmp_path: Path, weights: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["principal", "--model", TINY, "--rank", 0.05, "--density", 0.25, "--include", "*.self_attn.*"]
    mask = mask_of(tmp_path, *words)
    for name, one in weights.items():
        if one.dim() != 2 or ".self_attn." not in name:
            assert not selected(mask, name)
            continue
        u, s, vh = np.linalg.svd(one.double().numpy(), full_matrices=False)
        rank = math.ceil(0.05 * min(one.shape))
        scores = np.abs((u[:, :rank] * s[:rank]) @ vh[:rank]).ravel()
        order = np.argsort(-scores, kind="stable")
        count = round(0.25 * scores.size)
        assert scores[order[count - 1]] > scores[order[count]] * (1 + 1e-7)  # no tie within float32's rounding
        assert selected(mask, name) == set(order[:count].tolist())
    out, _ = out_of([*words, "-o", tmp_path / "p"], capfd)
    assert "4 tensors that are not matrices left out, first model.layers.0.self_attn.k_norm.weight." in out
    assert "12 tensors left out by --include and --exclude." in out


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["--layers", "1"], lambda name: ".layers.1." in name),
        (["--layers", "0-1"], lambda name: ".layers." in name),
        (["--layers", "0, 1", "--exclude", "*norm*"], lambda name: ".layers." in name and "norm" not in name),
        (["--include", "*norm*", "--include", "*q_proj*"], lambda name: "norm" in name or "q_proj" in name),
        (["--layers", "0", "--include", "*.mlp.*"], lambda name: ".layers.0.mlp." in name),
    ],
)
def test_layers_selects_all_or_nothing_of_a_tensor(
    tmp_path: Path, words: list[str], taken: Callable[[str], bool]
) -> None:
    mask = mask_of(tmp_path, "layers", "--model", TINY, *words)
    for name, tiles in mask.tensors.items():
        assert tiles.count() == (tiles.numel if taken(name) else 0), name
    assert 0 < mask.count() < mask.numel


# --------------------------------------------------------------------------------------------------
# from what training changed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {UP: {5, 900, 4000}, NORM: {0, 7}}),
        (["--changed-by", "atol"], {UP: {5, 900, 4000}}),
        (["--changed-by", "atol", "--atol", 1e-7], {UP: {5, 900, 4000}, NORM: {0, 7}}),
        (["--changed-by", "bf16"], {UP: {5, 900, 4000}}),
    ],
)
def test_diff_selects_what_changed_by_the_rule(
    tmp_path: Path, tuned: Path, words: list[Any], expected: dict[str, set[int]]
) -> None:
    mask = mask_of(tmp_path, "diff", TINY, tuned, *words)
    assert {name: selected(mask, name) for name in mask.shapes if mask.tensors[name].count()} == expected


def test_diff_of_a_delta_is_that_of_its_checkpoint(tmp_path: Path, tuned: Path) -> None:
    assert main(["delta", "diff", TINY, str(tuned), "-o", str(tmp_path / "d.safetensors")]) == 0
    for rule in ("bits", "atol", "bf16"):
        pair = mask_of(tmp_path, "diff", TINY, tuned, "--changed-by", rule)
        delta = mask_of(tmp_path, "diff", TINY, tmp_path / "d.safetensors", "--changed-by", rule, name="e.safetensors")
        assert (pair - delta).count() == (delta - pair).count() == 0 < pair.count()
        facts = [load_mask(tmp_path / name)[1] for name in ("m.safetensors", "e.safetensors")]
        assert facts[0]["model"] == facts[1]["model"]


def test_a_delta_in_another_dtype_is_compared_in_its_own(tmp_path: Path, loaded: LoadedModel) -> None:
    """A run in bfloat16 on a float32 base began from rounded weights: listed values that equal these did not change."""
    rounded = dict(loaded.model.named_parameters())[UP].detach().flatten()[[3, 8]].bfloat16()
    rounded[1] += 1
    changes = {UP: (torch.tensor([3, 8]), rounded)}
    save_delta(tmp_path / "d.safetensors", Delta(loaded.identity, loaded.shapes(), changes))
    assert selected(mask_of(tmp_path, "diff", TINY, tmp_path / "d.safetensors"), UP) == {8}


def test_rounding_that_counts_as_change_is_said(
    tmp_path: Path, weights: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    narrow = {name: one.bfloat16() for name, one in weights.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    out, _ = out_of(["diff", TINY, tmp_path / "narrow.safetensors", "-o", tmp_path / "m"], capfd)
    assert "24 tensors of other dtypes in BASE and TUNED (the first float32 and bfloat16)" in one_line(out)
    mask = load_mask(tmp_path / "m")[0]
    for name, one in weights.items():
        assert torch.equal(mask.tensors[name].to_dense(), narrow[name].float() != one)


# --------------------------------------------------------------------------------------------------
# set algebra


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], list[dict[str, set[int]]]]:
    """Three masks of the bundled reasoner and their coordinates."""
    paths = [tmp_path / f"{letter}.safetensors" for letter in "abc"]
    made = [
        mask_of(tmp_path, "random", "--model", TINY, "--density", share, "--seed", seed, name=path.name)
        for seed, (path, share) in enumerate(zip(paths, (0.3, 0.5, 0.2), strict=True))
    ]
    return paths, [{name: selected(mask, name) for name in mask.shapes} for mask in made]


def test_set_algebra_is_that_of_python(tmp_path: Path, three: tuple[list[Path], list[dict[str, set[int]]]]) -> None:
    paths, (a, b, c) = three
    expected: dict[str, Callable[[str], set[int]]] = {
        "union": lambda name: a[name] | b[name] | c[name],
        "intersect": lambda name: a[name] & b[name] & c[name],
        "minus": lambda name: a[name] - b[name] - c[name],
    }
    for operation, of in expected.items():
        mask = mask_of(tmp_path, operation, *paths)
        assert {name: selected(mask, name) for name in mask.shapes} == {name: of(name) for name in mask.shapes}
    mask = mask_of(tmp_path, "complement", paths[0])
    assert all(selected(mask, name) == set(range(mask.tensors[name].numel)) - a[name] for name in mask.shapes)


def test_a_combination_names_what_it_was_made_from(
    tmp_path: Path, three: tuple[list[Path], list[dict[str, set[int]]]]
) -> None:
    from ssrctl.io.manifest import file_hash

    paths, sets = three
    mask_of(tmp_path, "minus", *paths[:2])
    _, metadata = load_mask(tmp_path / "m.safetensors")
    settings = json.loads(metadata["settings"])
    assert metadata["mask_kind"] == "minus"
    assert settings["inputs"] == [
        {"name": path.name, "hash": file_hash(path), "mask_kind": "random", "count": sum(map(len, one.values()))}
        for path, one in zip(paths[:2], sets[:2], strict=True)
    ]
    assert str(tmp_path) not in str(metadata)


def test_masks_of_unknown_weights_are_combined_by_shape(
    tmp_path: Path, three: tuple[list[Path], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    paths, _ = three
    mask, metadata = load_mask(paths[0])
    save_mask(tmp_path / "n.safetensors", mask, mask_kind="steps", model=None, settings={})
    out, _ = out_of(["union", tmp_path / "n.safetensors", paths[1], "-o", tmp_path / "u"], capfd)
    assert "n.safetensors: made for unknown weights, so that only the shapes were checked." in one_line(out)
    assert load_mask(tmp_path / "u")[1]["model"] == metadata["model"]


# --------------------------------------------------------------------------------------------------
# what all masks have


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """A command for each kind of mask."""
    folder = tmp_path_factory.mktemp("inputs")
    a, b = (folder / f"{letter}.safetensors" for letter in "ab")
    for path, seed in ((a, 0), (b, 1)):
        mask_of(folder, "random", "--model", TINY, "--density", 0.5, "--seed", seed, name=path.name)
    tuned = folder / "tuned.safetensors"
    save_file({name: one + (one.abs() > 0.1) for name, one in weights.items()}, tuned)
    return {
        "random": ["random", "--model", TINY],
        "principal": ["principal", "--model", TINY],
        "low-magnitude": ["low-magnitude", "--model", TINY],
        "layers": ["layers", "--model", TINY, "--layers", "1"],
        "diff": ["diff", TINY, tuned],
        "union": ["union", a, b],
        "intersect": ["intersect", a, b],
        "minus": ["minus", a, b],
        "complement": ["complement", a],
    }


KINDS = ["random", "principal", "low-magnitude", "layers", "diff", "union", "intersect", "minus", "complement"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_mask_trains(tmp_path: Path, commands: dict[str, list[Any]], loaded: LoadedModel, kind: str) -> None:
    """Two steps with ``--mask``: the mask is taken as the model's own, and nothing outside of it moves."""
    path, run = tmp_path / "m.safetensors", tmp_path / "run"
    mask = mask_of(tmp_path, *commands[kind])
    assert load_mask(path)[1]["mask_kind"] == kind
    load_mask_for(path, loaded.shapes(), loaded.identity.fingerprint)
    train.run(
        TrainConfig(
            output_dir=run, mask=path, max_steps=2, questions_per_step=1, num_generations=4, max_new_tokens=16,
            learning_rate=1e-2, weight_decay=0.1,
        )
    )  # fmt: skip
    delta = DeltaFile(RunDir(run).checkpoints()[-1] / "delta.safetensors")
    for name in delta.counts:
        assert {index for indices, _ in delta.blocks(name) for index in indices.tolist()} <= selected(mask, name)
    assert delta.count > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_writes_nothing(
    tmp_path: Path, commands: dict[str, list[Any]], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = commands[kind]
    before = sorted(tmp_path.rglob("*"))
    out, err = out_of([*words, "-o", tmp_path / "x", "--dry-run"], capfd)
    assert out == "" and "writes" in err and "421248" in err
    plan = json.loads(out_of([*words, "-o", tmp_path / "x", "--dry-run", "--json"], capfd)[0])
    assert plan["writes"] == str(tmp_path / "x") and plan["coordinates"] == 421248
    assert plan["read_bytes"] == sum(Path(one).stat().st_size for one in plan["reads"])
    assert sorted(tmp_path.rglob("*")) == before
    if "selected" in plan:
        assert plan["selected"] == mask_of(tmp_path, *words).count()


def test_the_report_and_the_tables(tmp_path: Path, loaded: LoadedModel, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    words = ["random", "--model", TINY, "--density", 0.5, "--include", "*.layers.1.*", "-o", path]
    report = json.loads(out_of([*words, "--json"], capfd)[0])
    counts = {
        name: round(0.5 * math.prod(shape)) * fnmatch.fnmatch(name, "*.layers.1.*")
        for name, shape in loaded.shapes().items()
    }
    total = sum(counts.values())
    assert (report["selected"], report["coordinates"]) == (total, loaded.num_parameters)
    assert report["selected_frac"] == total / loaded.num_parameters
    assert (report["num_tensors_selected"], report["num_tensors"]) == (11, 24)
    assert {one["name"]: one["selected"] for one in report["tensors"]} == counts
    assert [(one["layer"], one["selected"]) for one in report["layers"]] == [("0", 0), ("1", total), ("other", 0)]
    assert {one["kind"]: one["selected"] for one in report["kinds"]}["up"] == counts[UP.replace(".0.", ".1.")]
    assert report["model"]["fingerprint"] == loaded.identity.fingerprint and report["bytes"] == path.stat().st_size
    out, err = out_of(words, capfd)
    assert f"{total:,} of {loaded.num_parameters:,} weights selected (24.83%), in 11 of 24 tensors" in out
    assert re.search(rf"^ +1 +{total:,} +209,216 +50\.00%", out, re.MULTILINE)
    assert re.search(r"^ +up +26,624 +106,496 +25\.00%", out, re.MULTILINE)
    assert f"wrote {path}" in err.replace("\n", "") and max(map(len, out.splitlines())) <= 120
    shown = out_of(["info", path], capfd)[0]
    assert shown.splitlines()[-10:] == out.splitlines()[-10:] and f"model: {TINY}" in shown
    info = json.loads(out_of(["info", path, "--json"], capfd)[0])
    # notes are of the making, and this time json is off in the settings
    differing = {key for key in info if info[key] != report.get(key)} - {"notes", "settings", "bytes"}
    assert differing == {"ssrctl_version"}
    assert info["settings"]["density"] == 0.5 and info["settings"]["seed"] == 0


def test_a_tensor_too_small_for_a_weight_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = out_of(["random", "--model", TINY, "--density", 0.005, "-o", tmp_path / "m"], capfd)
    assert "4 tensors too small for one weight at this density, first model.layers.0.self_attn.k_norm" in one_line(out)


def test_no_path_of_the_machine_is_published(tmp_path: Path, tuned: Path) -> None:
    for words in (["random", "--model", tuned], ["diff", tuned, TINY], ["complement", tmp_path / "m.safetensors"]):
        name = "n.safetensors" if words[0] == "complement" else "m.safetensors"
        mask_of(tmp_path, *words, name=name)
        with safe_open(tmp_path / name, "pt") as file:
            assert str(tmp_path) not in str(file.metadata())


# --------------------------------------------------------------------------------------------------
# what goes wrong


def wrong_inputs(tmp_path: Path, tuned: Path) -> dict[str, tuple[list[Any], str]]:
    a, b, torn, other, odd = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "torn", "other", "odd"))
    mask = mask_of(tmp_path, "random", "--model", TINY, "--density", 0.5, name=a.name)
    mask_of(tmp_path, "complement", a, name=b.name)
    torn.write_bytes(a.read_bytes()[:-5])
    identity = ModelIdentity(name="other", revision=None, fingerprint="xxh3:1")
    save_mask(other, mask, mask_kind="random", model=identity, settings={})
    extra = BlockMask({**mask.tensors, "extra": mask.tensors[UP].complement()})
    save_mask(odd, extra, mask_kind="random", model=None, settings={})
    nan = load_file(tuned / "model.safetensors")
    nan[UP][0, :2] = torch.nan
    save_file(nan, tmp_path / "nan.safetensors")
    save_file({"lonely": torch.ones(3)}, tmp_path / "small.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    out = ["-o", tmp_path / "out"]
    return {
        "no model": (["random", "--model", tmp_path / "absent", *out], "checkpoint not found"),
        "an adapter": (["random", "--model", tmp_path / "adapter", *out], "is a LoRA adapter"),
        "a mask as model": (["low-magnitude", "--model", torn, *out], "not a readable safetensors file"),
        "less than a weight": (["random", "--model", TINY, "--density", 1e-7, *out], "selects 0 of 421,248 weights"),
        "everything": (["random", "--model", TINY, "--density", 1, *out], "is all 421,248 weights"),
        "no matrix": (["principal", "--model", TINY, "--include", "*norm*", *out], "selects 0 of 421,248 weights"),
        "a pattern without match": (["layers", "--model", TINY, "--include", "*.mlp", *out], "matches none of the 24 tensors"),
        "all excluded": (["random", "--model", TINY, "--exclude", "*", *out], "selects 0 of 421,248 weights"),
        "no such layer": (["layers", "--model", TINY, "--layers", "0,2-3", *out], "no layer 3: tiny-reasoner has layers 0 to 1"),
        "no layers at all": (
            ["layers", "--model", tmp_path / "small.safetensors", "--layers", "0", *out], "no layers that its tensors' names tell"
        ),
        "layers misspelt": (["layers", "--model", TINY, "--layers", "0..3", *out], "must list layers like 0-3,7"),
        "layers backwards": (["layers", "--model", TINY, "--layers", "3-0", *out], "the range 3-0 runs backwards"),
        "which layers": (["layers", "--model", TINY, *out], "nothing says which weights to take"),
        "NaN": (["low-magnitude", "--model", tmp_path / "nan.safetensors", *out], f"{UP}: 2 of 53,248 weights are NaN"),
        "NaN in a matrix": (["principal", "--model", tmp_path / "nan.safetensors", *out], f"{UP}: 2 of 53,248 weights are NaN"),
        "nothing changed": (["diff", TINY, TINY, *out], "selects 0 of 421,248 weights"),
        "base is a delta": (["diff", tmp_path / "d.safetensors", TINY, *out], "is a delta, not whole weights"),
        "another model": (["diff", TINY, tmp_path / "small.safetensors", *out], "not the same architecture"),
        "another base": (["diff", tuned, tmp_path / "d.safetensors", *out], "belongs to tiny-reasoner"),
        "an empty intersection": (
            ["intersect", a, b, *out], f"`mask intersect` on {a} (210,624), {b} (210,624) is empty: it selects 0 of"
        ),
        "a full union": (["union", a, b, *out], "is all 421,248 weights"),
        "one mask": (["minus", a, *out], "two or more masks"),
        "other weights": (["union", a, other, *out], f"{a} and {other} were made for different weights"),
        "other tensors": (["union", a, odd, *out], f"{a} and {odd} are masks of different models, 1 tensors differ"),
        "a torn mask": (["union", a, torn, *out], "not a readable safetensors file"),
        "no mask": (["info", tuned / "model.safetensors"], "is not a mask file"),
        "a mask that is a delta": (["info", tmp_path / "d.safetensors"], "is not a mask file: it is a delta"),
        "output is an input": (["complement", a, "-o", a], "is one of the inputs"),
        "output is the model": (
            ["random", "--model", tuned, "-o", tuned / "model.safetensors"], "is one of the inputs"
        ),
        "output is a folder": (["random", "--model", TINY, "-o", tmp_path], "it is a folder"),
        "output in a file": (["random", "--model", TINY, "-o", a / "m"], "no file can be made in"),
        "density": (["random", "--model", TINY, "--density", 1.5, *out], "--density must be in (0, 1]"),
        "rank": (["principal", "--model", TINY, "--rank", 0, *out], "--rank must be in (0, 1]"),
        "no output": (["random", "--model", TINY], "give --output"),
    }  # fmt: skip


CASES = [
    "no model", "an adapter", "a mask as model", "less than a weight", "everything", "no matrix",
    "a pattern without match", "all excluded", "no such layer", "no layers at all", "layers misspelt",
    "layers backwards", "which layers", "NaN", "NaN in a matrix", "nothing changed", "base is a delta",
    "another model", "another base", "an empty intersection", "a full union", "one mask", "other weights",
    "other tensors", "a torn mask", "no mask", "a mask that is a delta", "output is an input", "output is the model",
    "output is a folder", "output in a file", "density", "rank", "no output",
]  # fmt: skip


def test_wrong_input_is_one_clear_error(tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["delta", "diff", TINY, str(tuned), "-o", str(tmp_path / "d.safetensors")]) == 0
    cases = wrong_inputs(tmp_path, tuned)
    assert list(cases) == CASES
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    for case, (words, message) in cases.items():
        out, err = out_of(words, capfd, 2)
        assert message in err and "Traceback" not in err and out == "", (case, err)
        assert err.count("error: ") == 1 and len(err.splitlines()) <= 2, (case, err)
        assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before, case


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": "[]"},
        {"shapes": '{"a": [-1]}'},
        {"counts": "3"},
        {"counts": '{"a": "x"}'},
        {"model": '"x"'},
        {"model": '{"name": 5}'},
        {"block_size": "[8, 8]"},
        {"settings": "{"},
        {"ssrctl_kind": "delta"},
    ],
)
def test_a_hostile_header_is_one_clear_error(
    tmp_path: Path, change: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    mask_of(tmp_path, "random", "--model", TINY, name="a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata() | change
    save_file(load_file(tmp_path / "a"), tmp_path / "b", metadata=metadata)
    if "counts" not in change:  # info counts for itself
        assert "error: " in out_of(["info", tmp_path / "b"], capfd, 2)[1]
    if "settings" not in change and "block_size" not in change:
        assert (
            "error: "
            in out_of(["union", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "x", "--dry-run"], capfd, 2)[1]
        )


def test_odd_metadata_is_shown_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mask_of(tmp_path, "random", "--model", TINY, name="a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata() | {
            "model": '{"name": "[red]x", "revision": null, "fingerprint": "f"}', "settings": "[1]", "mask_kind": "[b]"
        }  # fmt: skip
    save_file(load_file(tmp_path / "a"), tmp_path / "b", metadata=metadata)
    out, _ = out_of(["info", tmp_path / "b"], capfd)
    assert "kind: [b]" in out and "model: [red]x" in out
    assert json.loads(out_of(["info", tmp_path / "b", "--json"], capfd)[0])["settings"] == [1]
    metadata["model"] = '{"name": ["x"], "revision": 1, "fingerprint": null}'
    save_file(load_file(tmp_path / "a"), tmp_path / "c", metadata=metadata)
    assert main(["mask", "info", str(tmp_path / "c")]) == 2
    assert "does not name a model" in capfd.readouterr().err


def test_the_fingerprint_of_the_reader_is_that_of_the_model(tmp_path: Path, loaded: LoadedModel) -> None:
    mask_of(tmp_path, "random", "--model", TINY)
    model = json.loads(load_mask(tmp_path / "m.safetensors")[1]["model"])
    assert model["fingerprint"] == fingerprint(loaded.model.named_parameters())


def test_a_mask_names_a_model_of_the_hubs_cache_as_the_hub_does(tmp_path: Path) -> None:
    base, tuned = (tmp_path / "models--org--name" / "snapshots" / revision for revision in ("abc", "def"))
    for folder, value in ((base, 1.0), (tuned, 2.0)):
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor([1.0, value])}, folder / "model.safetensors")
    assert main(["mask", "diff", str(base), str(tuned), "-o", str(tmp_path / "m.safetensors"), "--json"]) == 0
    metadata = load_mask(tmp_path / "m.safetensors")[1]
    model, other = json.loads(metadata["model"]), json.loads(metadata["settings"])["tuned_model"]
    assert (model["name"], model["revision"]) == ("org/name", "abc")
    assert (other["name"], other["revision"]) == ("org/name", "def")


def test_a_random_mask_like_another_has_its_counts(tmp_path: Path) -> None:
    given = mask_of(tmp_path, "low-magnitude", "--model", TINY, "--density", "0.3", "--include", "*proj*")
    like = ("random", "--model", TINY, "--like", tmp_path / "m.safetensors", "--seed")
    first, second = (mask_of(tmp_path, *like, seed, name=f"r{seed}.safetensors") for seed in (0, 1))
    counts = [{name: tiles.count() for name, tiles in mask.tensors.items()} for mask in (given, first, second)]
    assert counts[0] == counts[1] == counts[2]
    assert first.jaccard(second) < 0.3 and first.jaccard(given) < 0.3


def test_a_complement_within_the_tensors_of_a_mask(tmp_path: Path) -> None:
    given = mask_of(tmp_path, "random", "--model", TINY, "--density", "0.25", "--include", "*mlp*")
    rest = mask_of(tmp_path, "complement", tmp_path / "m.safetensors", "--within", name="c.safetensors")
    for name, tiles in given.tensors.items():
        assert rest.tensors[name].count() == (tiles.numel - tiles.count() if "mlp" in name else 0)
    assert (rest & given).count() == 0


def test_masks_are_compared_with_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    masks = [
        mask_of(tmp_path, "random", "--model", TINY, "--density", "0.2", "--include", "*mlp*", "--seed", str(seed),
                name=f"{seed}.safetensors")
        for seed in (0, 1)
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["mask", "compare", *map(str, paths), str(paths[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, same, _ = found["pairs"]
    assert first["jaccard"] == pytest.approx(masks[0].jaccard(masks[1])) and same["jaccard"] == 1.0
    share = masks[0].count() / masks[0].numel
    assert first["expected_jaccard"] == pytest.approx(share / (2 - share), rel=1e-3)
    # two random halves of the same tensors agree by chance within them: 0.2 * 0.2 of 0.2 + 0.2 - 0.04
    assert first["expected_jaccard_within_tensors"] == pytest.approx(0.04 / 0.36, rel=1e-2)
    assert first["jaccard"] == pytest.approx(0.04 / 0.36, abs=0.02)
    monkeypatch.chdir(tmp_path)
    assert main(["mask", "compare", "0.safetensors", "1.safetensors"]) == 0
    assert "0.safetensors and 1.safetensors share" in " ".join(capsys.readouterr().out.split())
    assert main(["mask", "compare", str(paths[0])]) == 2
