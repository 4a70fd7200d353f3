"""Pairs whose two sides differ by tensors: what both have is compared, the rest is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.names import replaced_prefix
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.cli import main
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_mask

Weights = dict[str, torch.Tensor]
EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base() -> Weights:
    generator = torch.Generator().manual_seed(0)
    found = {EMBEDDING: torch.randn(10, 8, generator=generator), HEAD: torch.randn(10, 8, generator=generator)}
    for layer in range(2):
        for part, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8)):
            found[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = torch.randn(rows, 8, generator=generator)
    return found | {"model.norm.weight": torch.ones(8)}


def folder(path: Path, weights: Weights) -> Path:
    path.mkdir()
    save_file({name: one.contiguous() for name, one in weights.items()}, path / "model.safetensors")
    return path


def moved(weights: Weights) -> Weights:
    """Every first element of a tensor moved."""
    found = {name: one.clone() for name, one in weights.items()}
    for one in found.values():
        one.view(-1)[0] += 1
    return found


def report(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[object], code: int = 0) -> dict:
    capfd.readouterr()
    assert main([*map(str, words), "--json"]) == code, capfd.readouterr().err
    return json.loads(capfd.readouterr().out) if not code else {"err": capfd.readouterr().err}


@pytest.mark.parametrize("rows", [7, 13])
def test_a_resized_vocabulary(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights, rows: int) -> None:
    tuned, common = moved(base), min(rows, 10)
    for name in (EMBEDDING, HEAD):
        tuned[name] = torch.cat([tuned[name], torch.randn(9, 8)])[:rows]
    ours, theirs, delta = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned), tmp_path / "d.safetensors"
    pair = [ours, theirs]
    measured = report(tmp_path, capfd, ["diagnose", *pair, "-o", tmp_path / "r", "--measures", "sparsity"])
    assert (
        f"{EMBEDDING} has 10 rows in BASE and {rows} in TUNED: the first {common} were compared." in measured["notes"]
    )
    cut = [
        folder(tmp_path / f"cut{n}", {k: v[:common] if k in (EMBEDDING, HEAD) else v for k, v in one.items()})
        for n, one in enumerate((base, tuned))
    ]
    expected = report(tmp_path, capfd, ["diagnose", *cut, "-o", tmp_path / "r2", "--measures", "sparsity"])
    numbers = ("total", "layers", "kinds", "tensors", "movers")
    assert [measured[key] for key in numbers] == [expected[key] for key in numbers]

    made = report(tmp_path, capfd, ["delta", "diff", *pair, "-o", delta])
    assert made["changed"] == len(base)
    report(tmp_path, capfd, ["delta", "apply", ours, delta, "-o", tmp_path / "applied"])
    applied = load_file(tmp_path / "applied/model.safetensors")
    for name, before in base.items():
        wanted = before.clone()
        wanted[: len(tuned[name])] = tuned[name][: len(before)]
        assert torch.equal(applied[name], wanted)
    assert made["tuned"]["fingerprint"] == fingerprint(applied.items())

    report(tmp_path, capfd, ["mask", "diff", *pair, "-o", tmp_path / "m.safetensors"])
    mask, _ = load_mask(tmp_path / "m.safetensors")
    assert {name: tuple(one.shape) for name, one in mask.to_dense().items()} == {
        n: tuple(t.shape) for n, t in base.items()
    }
    assert all(one.flatten().nonzero().tolist() == [[0]] for one in mask.to_dense().values())


def test_a_value_head_a_tower_and_a_missing_head(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights
) -> None:
    tuned = moved(base) | {"v_head.weight": torch.ones(1, 8), "visual.blocks.0.weight": torch.ones(50, 50)}
    del tuned[HEAD]
    pair = [folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)]
    for command in (["delta", "diff"], ["mask", "diff"]):
        found = report(tmp_path, capfd, [*command, *pair, "-o", tmp_path / f"{command[0]}.safetensors"])
        assert f"Left out, only in BASE: 1 of 13 tensors ({HEAD})." in found["notes"]
        assert "Left out, only in TUNED: 2 of 13 tensors (v_head.weight, visual.blocks.0.weight)." in found["notes"]
        assert HEAD in report(tmp_path, capfd, [*command, *pair, "-o", tmp_path / "x", "--strict"], 2)["err"]


@pytest.mark.parametrize(
    ("old", "new"), [("", "base_model.model."), ("", "language_model."), ("model.", "model.language_model.")]
)
def test_another_prefix(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights, old: str, new: str) -> None:
    tuned = {new + name.removeprefix(old) if name.startswith(old) else name: one for name, one in moved(base).items()}
    tuned["vision_tower.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8)
    ours, theirs = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    for one, other in ((ours, theirs), (theirs, ours)):
        delta = tmp_path / f"{one.name}.safetensors"
        assert report(tmp_path, capfd, ["delta", "diff", one, other, "-o", delta])["changed"] == len(base)
        report(tmp_path, capfd, ["delta", "apply", one, delta, "-o", tmp_path / f"out-{one.name}"])
    applied = load_file(tmp_path / "out-base/model.safetensors")
    assert applied.keys() == base.keys() and all(torch.equal(applied[n], one) for n, one in moved(base).items())


def test_a_prefix_needs_most_of_a_model() -> None:
    shapes = {f"model.layers.{n}.up.weight": (n + 1, 3) for n in range(4)}
    assert replaced_prefix({f"x.layers.{n}.up.weight": (n + 1, 3) for n in range(4)}, shapes) == ("x.", "model.")
    assert replaced_prefix({f"x.layers.{n}.up.weight": (9, 3) for n in range(4)}, shapes) is None
    assert replaced_prefix({"x.layers.0.up.weight": (1, 3)} | {f"y{n}": (1,) for n in range(4)}, shapes) is None


def test_q_k_and_v_in_one_matrix(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights) -> None:
    tuned = moved(base)
    for layer in range(2):
        parts = [tuned.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        tuned[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    ours, theirs = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    for one, other in ((ours, theirs), (theirs, ours)):
        delta = tmp_path / f"{one.name}.safetensors"
        assert report(tmp_path, capfd, ["delta", "diff", one, other, "-o", delta])["changed"] == len(base)
    with TensorReader(ours) as reader:
        assert len(reader.join_rows({n: tuple(t.shape) for n, t in tuned.items()})) == 2
        name = "model.layers.1.self_attn.qkv_proj.weight"
        assert reader.tensor(name)[1:8].equal(tuned[name][1:8])


def test_patterns_choose_tensors(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights) -> None:
    pair = [folder(tmp_path / "base", base), folder(tmp_path / "tuned", moved(base))]
    out = ["-o", tmp_path / "d.safetensors"]
    assert report(tmp_path, capfd, ["delta", "diff", *pair, *out, "--include", "*q_proj*"])["changed"] == 2
    assert report(tmp_path, capfd, ["mask", "diff", *pair, *out, "--exclude", "*_proj*"])["selected"] == 3
    said = report(tmp_path, capfd, ["diagnose", *pair, "-o", tmp_path / "r", "--include", "*nothing*"], 2)["err"]
    assert "matches none of the 11 tensors" in said


def test_too_little_in_common_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights) -> None:
    other = {name: one if name == Q else torch.ones(3, 5) for name, one in base.items()}
    ours, theirs = folder(tmp_path / "base", base), folder(tmp_path / "tuned", other)
    words = ["delta", "diff", ours, theirs, "-o", tmp_path / "d"]
    assert "not the same architecture, 10 tensors differ" in report(tmp_path, capfd, words, 2)["err"]
    (theirs / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "tuned is quantised (gptq): dequantise it first" in report(tmp_path, capfd, words, 2)["err"].replace(
        "\n", " "
    )


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/q4.gguf").write_bytes(b"GGUF")
    for place in (tmp_path / "m", tmp_path / "m/q4.gguf"):
        with pytest.raises(UserError, match=r"gguf.*from_pretrained\(FOLDER, gguf_file=NAME\)"):
            TensorReader(place)
