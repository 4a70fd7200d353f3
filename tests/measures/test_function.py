"""Functional distances are those of transformers' models on the same prompts, and prune curves end at the whole update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssrctl import tiny_reasoner
from ssrctl.cli import main
from ssrctl.measures import sparsity
from ssrctl.report import write

TEXTS = [
    "<bos>8+3=?\n8+3=11\n####11<eos>",
    "<bos>12-5=?",
    "<bos>7*6=?\n7*6=42",
    "<bos>2+2+9=?\n2+2=4\n4+9=13",
    "<bos>1+1=",
]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(write, "missing_libraries", lambda: ["matplotlib"])  # a page takes a second
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(*words: object, code: int = 0) -> Any:
        capfd.readouterr()
        found = main(["diagnose", *map(str, words), "--json", "-o", "out"])
        out, err = capfd.readouterr()
        assert found == code, err
        return err if code else json.loads(out)

    return run


def model_folder(where: Path, change: Any) -> Path:
    shutil.copytree(tiny_reasoner.path(), where)
    tensors = load_file(where / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        change(name, tensors[name], generator)
    save_file(tensors, where / "model.safetensors", {"format": "pt"})
    return where


def noise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    if "mlp" in name:
        chosen = torch.rand(tensor.shape, generator=generator) < 0.1
        tensor += chosen * 0.05 * torch.randn(tensor.shape, generator=generator)


def by_transformers(folder: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double().softmax(-1) for text in TEXTS]


def test_the_distance_is_that_of_transformers(shell: Any, tmp_path: Path) -> None:
    tuned = model_folder(tmp_path / "tuned", noise)
    report = shell("tiny-reasoner", tuned, "--measures", "prune", "--prompts", "prompts.jsonl")
    [found] = report["function"]["checkpoints"]
    p, q = by_transformers(tiny_reasoner.path()), by_transformers(tuned)
    forward = torch.tensor([float((a * (a / b).log()).sum(-1).mean()) for a, b in zip(p, q, strict=True)])
    backward = torch.tensor([float((b * (b / a).log()).sum(-1).mean()) for a, b in zip(p, q, strict=True)])
    assert found["kl_base_tuned"]["value"] == pytest.approx(float(forward.mean()), rel=1e-4)
    assert found["kl_tuned_base"]["value"] == pytest.approx(float(backward.mean()), rel=1e-4)
    assert abs(float(forward.mean() - backward.mean())) > 1e-3 * float(forward.mean())  # the two can be told apart
    half = float(t.ppf(0.975, len(TEXTS) - 1)) * float(forward.std()) / len(TEXTS) ** 0.5
    assert found["kl_base_tuned"]["high"] == pytest.approx(float(forward.mean()) + half, rel=1e-3)
    curve = found["prune"]["curve"]
    assert [point["share"] for point in curve] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    whole, tenth = curve[-1], curve[3]
    assert (whole["largest_frac"], whole["largest_left"], whole["num_kept"]) == (1, 0, found["prune"]["num_changed"])
    assert tenth["num_kept"] == round(0.1 * whole["num_kept"])
    assert tenth["largest_kl"] > 2 * tenth["random_kl"] > 0
    assert tenth["largest_left"] < tenth["random_left"]
    assert any("the largest 10% of the changes give" in line for line in report["headlines"])


def test_the_same_function_has_distance_zero_whatever_is_pruned(shell: Any, tmp_path: Path) -> None:
    still = model_folder(tmp_path / "still", lambda *_: None)
    moved = model_folder(tmp_path / "moved", noise)
    report = shell("tiny-reasoner", moved, still, "--measures", "default,prune", "--prompts", "prompts.jsonl")
    assert report["overlap"]  # the default of several checkpoints
    far, near = report["function"]["checkpoints"]
    assert far["kl_base_tuned"]["value"] > 0 and len(far["prune"]["curve"]) == 7
    assert near["kl_base_tuned"] == near["kl_tuned_base"] | {"value": 0, "low": 0, "high": 0}
    assert near["same_top_frac"] == 1 and near["prune"] == {"num_changed": 0, "curve": []}


def test_what_cannot_be_measured_is_said_before_anything_is_computed(
    shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = model_folder(tmp_path / "tuned", noise)
    asked = ("--measures", "sparsity,function")
    assert "whole models" in shell("tiny-reasoner", tuned, *asked, "--layers", "0", code=2)
    assert "no effect" in shell("tiny-reasoner", tuned, "--prompts", "prompts.jsonl", code=2)
    assert "neither a file" in shell("tiny-reasoner", tuned, *asked, "--prompts", "nothing", code=2)
    tensors = load_file(tuned / "model.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    assert "no config.json" in shell("bare", tuned, *asked, code=2)
    first = min(name for name in tensors if "mlp" in name)
    del tensors[first]
    save_file(tensors, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    assert first in shell("tiny-reasoner", "bare", *asked, code=2)
    (tmp_path / "foreign.jsonl").write_text("".join(json.dumps({"text": "words " * 3}) + "\n" for _ in range(4)))
    monkeypatch.setattr(sparsity.Sparsity, "tensor", None)  # the walk over the tensors comes last
    assert "unknown to the model's tokenizer" in shell(
        "tiny-reasoner", tuned, *asked, "--prompts", "foreign.jsonl", code=2
    )
    assert not (tmp_path / "out").exists()
