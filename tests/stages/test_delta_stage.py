"""`ssrctl delta` from files to files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.delta import Delta, DeltaFile, apply_delta, load_delta, save_delta
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.cli import main
from ssrctl.configs import DeltaApplyConfig, DeltaDiffConfig, ModelConfig
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.models.loading import load_model
from ssrctl.stages import delta as stage

TINY = "tiny-reasoner"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The bundled reasoner with three weights of one tensor changed."""
    weights = load_file(tiny_reasoner.path() / "model.safetensors")
    weights[UP].view(-1)[[5, 900, 4000]] += 0.25
    (tmp_path / "tuned").mkdir()
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "tuned"


@pytest.fixture
def delta(tmp_path: Path, tuned: Path) -> Path:
    stage.run_diff(DeltaDiffConfig(base=Path(TINY), tuned=tuned, output=tmp_path / "d.safetensors", json=True))
    return tmp_path / "d.safetensors"


@pytest.fixture
def plain(tmp_path: Path, tuned: Path) -> Path:
    path = tmp_path / "plain.safetensors"
    stage.run_diff(DeltaDiffConfig(base=Path(TINY), tuned=tuned, output=path, format="plain", json=True))
    return path


def out_of(words: list[str], capfd: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    """Run a command and return what it wrote to stdout and stderr."""
    capfd.readouterr()
    assert main(words) == code, capfd.readouterr().err
    return capfd.readouterr()


def test_diff_reports_what_changed(tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.safetensors"
    out, _ = out_of(["delta", "diff", TINY, str(tuned), "-o", str(path), "--json"], capfd)
    report = json.loads(out)
    weights = load_file(tiny_reasoner.path() / "model.safetensors")
    total = sum(one.numel() for one in weights.values())
    assert (report["changed"], report["coordinates"], report["changed_frac"]) == (3, total, 3 / total)
    assert (report["num_tensors_changed"], report["num_tensors"]) == (1, len(weights))
    assert report["bytes"] == path.stat().st_size and report["dense_bytes"] == 4 * total
    assert report["bytes_frac"] == path.stat().st_size / (4 * total)
    assert report["dtypes"] == {"float32": len(weights)} and report["notes"] == []
    assert report["base"]["name"] == TINY and report["tuned"]["name"] == "tuned"
    assert [one for one in report["tensors"] if one["changed"]] == [
        {"name": UP, "shape": [416, 128], "dtype": "float32", "coordinates": 53248, "changed": 3,
         "changed_frac": 3 / 53248}
    ]  # fmt: skip
    layers = {one["layer"]: one for one in report["layers"]}
    assert list(layers) == ["0", "1", "other"] and layers["0"]["changed"] == 3 and layers["1"]["changed"] == 0
    assert sum(one["coordinates"] for one in layers.values()) == total
    assert [indices.tolist() for indices, _ in DeltaFile(path).blocks(UP)] == [[5, 900, 4000]]
    settings = DeltaFile(path).settings
    assert settings["base"] == TINY and settings["tuned"] == "tuned" and "torch" in settings["versions"]


def test_diff_and_info_show_tables_that_fit(tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "d.safetensors")
    out, err = out_of(["delta", "diff", TINY, str(tuned), "-o", path], capfd)
    weights = load_file(tuned / "model.safetensors")
    total = sum(one.numel() for one in weights.values())
    assert f"3 of {total:,} coordinates changed (0.001%), in 1 of {len(weights)} tensors." in out
    assert re.search(rf"{re.escape(UP)} +3 +0\.01%", out) and f"wrote {path}" in err.replace("\n", "")
    out, _ = out_of(["delta", "info", path], capfd)
    assert f"base: {TINY}" in out and "tuned: tuned" in out and "dtypes: float32" in out
    assert re.search(r"^ +0 +3 +", out, re.MULTILINE) and re.search(r"^ +other +0 +0\.00%", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 120


def test_apply_gives_the_tuned_model_as_a_folder(
    tmp_path: Path, tuned: Path, delta: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    out, _ = out_of(["delta", "apply", TINY, str(delta), "-o", str(folder), "--json"], capfd)
    report = json.loads(out)
    expected = load_file(tuned / "model.safetensors")
    assert report["entries"] == 3 and report["weights"] == ["model.safetensors"] and report["notes"] == []
    assert report["fingerprint"] == fingerprint(expected.items())
    assert report["copied"] == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
                                "tokenizer_config.json"]  # fmt: skip
    for name in report["copied"]:
        assert (folder / name).read_bytes() == (tiny_reasoner.path() / name).read_bytes()
    assert sorted(one.name for one in folder.iterdir()) == sorted([*report["copied"], "model.safetensors"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    ids = AutoTokenizer.from_pretrained(folder)("1+1=", return_tensors="pt").input_ids
    original = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path())
    assert not torch.equal(model(ids).logits, original(ids).logits)
    # eval puts the same delta on the same base in memory
    loaded = load_model(ModelConfig(model=TINY))
    apply_delta(DeltaFile(delta), dict(loaded.model.named_parameters()), loaded.identity.fingerprint)
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_what_was_applied_to_shards(
    tmp_path: Path, tied: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    base, tuned, run = (tmp_path / name for name in ("base", "tuned", "run"))
    model.save_pretrained(base, max_shard_size="2KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    started = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] += 0.5
    model.save_pretrained(tuned, max_shard_size="5KB")
    out_of(["delta", "diff", str(base), str(tuned), "-o", str(tmp_path / "d.st")], capfd)
    out_of(["delta", "apply", str(base), str(tmp_path / "d.st"), "-o", str(tmp_path / "out")], capfd)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    for (name, ours), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    # what a run in float32 writes: values that bfloat16 does not hold
    changes = {name: (torch.tensor([0, 3]), torch.tensor([0.1, 0.7])) for name in started}
    identity = ModelIdentity(name="base", revision=None, fingerprint=fingerprint(started.items()))
    shapes = {name: tuple(one.shape) for name, one in started.items()}
    save_delta(run / "checkpoints" / "000007" / "delta.safetensors", Delta(identity, shapes, changes))
    (run / "checkpoints" / "000007" / "COMPLETE").touch()
    out, _ = out_of(["delta", "apply", str(base), str(run), "-o", str(tmp_path / "wide")], capfd)
    assert f"{len(started)} tensors stored as bfloat16 in BASE converted to float32" in out
    assert "config.json now asks for float32" in out
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert wide.dtype == torch.float32
    for name, parameter in wide.named_parameters():
        expected = started[name].float()
        expected.view(-1)[[0, 3]] = torch.tensor([0.1, 0.7])
        assert torch.equal(parameter, expected), name


def test_the_dry_runs_write_nothing(
    tmp_path: Path, tuned: Path, delta: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    words = ["delta", "diff", TINY, str(tuned), "-o", str(tmp_path / "x"), "--dry-run"]
    _, err = out_of(words, capfd)
    assert "tensors" in err and "writes" in err
    plan = json.loads(out_of([*words, "--json"], capfd)[0])
    size = (tiny_reasoner.path() / "model.safetensors").stat().st_size + (tuned / "model.safetensors").stat().st_size
    assert plan["read_bytes"] == size and plan["writes"] == str(tmp_path / "x")
    words = ["delta", "apply", TINY, str(delta), "-o", str(tmp_path / "y"), "--dry-run", "--json"]
    plan = json.loads(out_of(words, capfd)[0])
    assert plan["write_bytes"] == sum(one.nbytes for one in load_file(tuned / "model.safetensors").values())
    assert sorted(tmp_path.iterdir()) == before


def other_base(tmp_path: Path) -> Path:
    weights = load_file(tiny_reasoner.path() / "model.safetensors")
    weights["model.norm.weight"] += 1
    (tmp_path / "other").mkdir()
    save_file(weights, tmp_path / "other" / "model.safetensors")
    return tmp_path / "other"


def test_a_wrong_base_needs_a_word(tmp_path: Path, delta: Path, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, folder = other_base(tmp_path), tmp_path / "out"
    words = ["delta", "apply", str(base), str(delta), "-o", str(folder)]
    _, err = out_of(words, capfd, 2)
    assert "belongs to tiny-reasoner xxh3:" in err and "--ignore-fingerprint" not in err
    _, err = out_of([*words, "--ignore-fingerprint"], capfd, 2)
    assert "steps from the values of tiny-reasoner" in err and "--format plain" in err
    words = ["delta", "apply", str(base), str(plain), "-o", str(folder)]
    _, err = out_of(words, capfd, 2)
    assert "belongs to tiny-reasoner xxh3:" in err and "or give --ignore-fingerprint" in err
    assert not folder.exists()
    out, _ = out_of([*words, "--ignore-fingerprint"], capfd)
    assert "It was not checked that other is the base" in out and "There is no config.json next to other" in out
    assert "bit for bit" not in out
    found, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {UP} and torch.equal(found["model.norm.weight"], before["model.norm.weight"])


def test_a_value_that_was_damaged_is_noticed(tmp_path: Path, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(plain.read_bytes())
    data[-1] ^= 1  # the top byte of the last value, which no structure tells from a right one
    plain.write_bytes(data)
    _, err = out_of(["delta", "apply", TINY, str(plain), "-o", str(tmp_path / "out")], capfd, 2)
    assert "it was made from tuned xxh3:" in err and "values are damaged" in err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["plain.safetensors", "tuned"]


def wrong_inputs(tmp_path: Path, tuned: Path, plain: Path) -> dict[str, tuple[list[Any], str]]:
    torn, full, bad = tmp_path / "torn.safetensors", tmp_path / "full", tmp_path / "bad.safetensors"
    torn.write_bytes(plain.read_bytes()[:-5])
    full.mkdir()
    (full / "x").touch()
    held = load_delta(plain)
    _, values = held.changes[UP]
    save_delta(bad, Delta(held.base, held.shapes, {UP: (torch.tensor([5, 900, 53248]), values)}))
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").touch()
    out = ["-o", tmp_path / "out"]
    return {
        "torn": (["apply", TINY, torn, *out], "not a readable safetensors file"),
        "torn, shown": (["info", torn], "not a readable safetensors file"),
        "out of range": (["apply", TINY, bad, *out], f"{UP}: indices are not ascending within 0..53247"),
        "out of range, shown": (["info", bad], f"{UP}: indices are not ascending within 0..53247"),
        "no delta": (["apply", TINY, tuned / "model.safetensors", *out], "is not a delta file"),
        "a whole model": (["info", tuned], "is a whole model, not a delta"),
        "a run too young": (["info", tmp_path / "young"], "has no complete checkpoint"),
        "not there": (["info", tmp_path / "absent"], "checkpoint not found"),
        "base is a delta": (["apply", plain, plain, *out], "is a delta, not whole weights"),
        "tuned is a delta": (["diff", TINY, plain, *out], f"see `ssrctl delta info {plain}`"),
        "output is an input": (
            ["diff", TINY, tuned, "-o", tuned / "model.safetensors"],
            "one of the weights to compare",
        ),
        "output in use": (["apply", TINY, plain, "-o", full], "full is not empty"),
        "no output": (["apply", TINY, delta], "give --output"),
        "no delta given": (["apply", TINY], "give DELTA"),
        "no tuned given": (["diff", TINY], "give TUNED"),
    }


CASES = ["torn", "torn, shown", "out of range", "out of range, shown", "no delta", "a whole model", "a run too young",
         "not there", "base is a delta", "tuned is a delta", "output is an input", "output in use", "no output", "no delta given",
         "no tuned given"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_clear_error(
    case: str, tmp_path: Path, tuned: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words, message = wrong_inputs(tmp_path, tuned, plain)[case]
    before = sorted(tmp_path.rglob("*"))
    out, err = out_of(["delta", *map(str, words)], capfd, 2)
    assert message in err and "fix:" in err and "Traceback" not in err and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_on_one_side_are_listed(tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(tuned / "model.safetensors")
    weights["extra.weight"] = weights.pop("model.norm.weight")
    save_file(weights, tuned / "model.safetensors")
    words = ["delta", "diff", TINY, str(tuned), "-o", str(tmp_path / "d")]
    _, err = out_of([*words, "--strict"], capfd, 2)
    assert "model.norm.weight only in BASE; extra.weight only in TUNED" in err
    assert not (tmp_path / "d").exists()
    notes = json.loads(out_of([*words, "--json"], capfd)[0])["notes"]
    assert any("only in BASE: 1 of" in one and "(model.norm.weight)" in one for one in notes)
    assert any("only in TUNED: 1 of" in one and "(extra.weight)" in one for one in notes)


def test_constants_that_both_store_are_no_part_of_a_delta(tmp_path: Path) -> None:
    weights = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.c_attn.weight": torch.randn(4, 12)}
    changed = weights | {"h.0.attn.c_attn.weight": weights["h.0.attn.c_attn.weight"] + 1}
    paths = {}
    for name, tensors in (("base", weights), ("tuned", changed)):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    config = DeltaDiffConfig(**paths, output=tmp_path / "d.safetensors", json=True)
    report = stage.run_diff(config)
    assert list(DeltaFile(config.output).shapes) == ["h.0.attn.c_attn.weight"]
    assert report["notes"] == ["1 constant, the same in both, left out: not parameters."]
    apply = DeltaApplyConfig(base=paths["base"], delta=config.output, output=tmp_path / "out", json=True)
    stage.run_apply(apply)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], one) for name, one in changed.items()) and found.keys() == changed.keys()


def test_a_runs_delta_is_shown_with_what_it_knows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    identity = ModelIdentity(name="base", revision="main", fingerprint="xxh3:0")
    changes = {"model.layers.10.w": (torch.tensor([1]), torch.ones(1).bfloat16())}
    shapes = {"model.layers.10.w": (4,), "model.layers.9.w": (4,), "n": (2,)}
    save_delta(tmp_path / "d.safetensors", Delta(identity, shapes, changes), {"optimizer": "kronos"})
    report = json.loads(out_of(["delta", "info", str(tmp_path / "d.safetensors"), "--json"], capfd)[0])
    assert report["tuned"] is None and report["settings"] == {"optimizer": "kronos"}
    assert report["dense_bytes"] == 20 and report["dtypes"] == {"bfloat16": 3}  # a run's tensors have one dtype
    assert [(one["layer"], one["changed"]) for one in report["layers"]] == [("9", 0), ("10", 1), ("other", 0)]
    assert "base (main)" in out_of(["delta", "info", str(tmp_path / "d.safetensors")], capfd)[0]
    save_delta(tmp_path / "d.safetensors", Delta(identity, shapes, {}))
    report = json.loads(out_of(["delta", "info", str(tmp_path / "d.safetensors"), "--json"], capfd)[0])
    assert (report["changed"], report["dense_bytes"], report["bytes_frac"]) == (0, None, None)
    assert "dtypes: not recorded" in out_of(["delta", "info", str(tmp_path / "d.safetensors")], capfd)[0]


# A process's ru_maxrss begins with what its parent had used, its VmHWM does not.
MEASURED = """
import sys
from ssrctl.cli import main
code = main(sys.argv[1:])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def peak_bytes(*words: str) -> int:
    """The largest resident set of a process that runs ``ssrctl delta``."""
    call = [sys.executable, "-c", MEASURED, "delta", *words, "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return int(done.stderr.splitlines()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_tensor_nor_with_its_changes(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"diff": [], "apply": [], "info": []}
    sizes = [2**25, 5 * 2**25]
    for size in sizes:
        base, tuned, path, folder = (
            str(tmp_path / f"{size}{end}") for end in ("b.safetensors", "t.safetensors", "d", "out")
        )
        bits = torch.arange(size // 2).to(torch.int16)
        save_file({"w": bits.view(torch.bfloat16)}, base)
        save_file({"w": (bits + 1).view(torch.bfloat16)}, tuned)  # all change: the delta is three times as large
        peaks["diff"].append(peak_bytes("diff", base, tuned, "-o", path))
        peaks["apply"].append(peak_bytes("apply", base, path, "-o", folder))
        peaks["info"].append(peak_bytes("info", path))
        assert DeltaFile(path).count == size // 2
    for small, large in peaks.values():
        assert large - small < (sizes[1] - sizes[0]) / 2
