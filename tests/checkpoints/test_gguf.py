"""GGUF files as the tuned side of `diagnose`: the numbers are those of the same weights in safetensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ssrctl
from ssrctl.cli import main
from ssrctl.report import write as write_report

Weights = dict[str, torch.Tensor]
HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture
def base() -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (12, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        for part, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (rows, 16)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a page takes a second."""
    monkeypatch.setattr(write_report, "missing_libraries", lambda: ["matplotlib"])


def folder(path: Path, weights: Weights) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return path


def write(path: Path, weights: Weights, kind: str, architecture: str = "llama") -> Path:
    """Write a GGUF file as llama.cpp converts a Hugging Face model: halves of each head's rows interleaved."""
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(HEADS["q_proj"])
    writer.add_head_count_kv(HEADS["k_proj"])
    known = gguf.MODEL_ARCH.QWEN3 if architecture == "qwen3" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(known, 2)
    for name, tensor in weights.items():
        for part, heads in HEADS.items():
            if part in name and architecture == "llama":
                halves = tensor.view(heads, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, (".weight", ".bias"))
        if kind == "BF16" and tensor.dim() > 1:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(stored, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif kind == "Q8_0" and tensor.dim() > 1:
            raw = np.zeros((tensor.shape[0], 34), np.uint8)  # one block of 32 weights a row
            writer.add_tensor(stored, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            wide = kind != "F16" or tensor.dim() == 1  # as llama.cpp, which keeps vectors in float32
            writer.add_tensor(stored, (tensor.float() if wide else tensor.half()).numpy())
    writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def diagnosed(capfd: pytest.CaptureFixture[str], base: Path, tuned: Path, *words: str, code: int = 0) -> Any:
    capfd.readouterr()
    out = tuned.parent / "out"
    assert main(["diagnose", str(base), str(tuned), "--json", "-o", str(out), *words]) == code
    found = capfd.readouterr()
    return found.err if code == 2 else json.loads(found.out)


@pytest.mark.parametrize(("kind", "architecture"), [("BF16", "llama"), ("F16", "llama"), ("F32", "qwen2")])
def test_the_numbers_are_those_of_safetensors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights, kind: str, architecture: str
) -> None:
    tuned = {name: one.clone() for name, one in base.items()}
    for name, one in tuned.items():
        one.view(-1)[3] += 1 + 0.5 * ("q_proj" in name)
    before, after = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    words = ("--measures", "sparsity,rank,landing")
    dense = diagnosed(capfd, before, after, *words)
    found = diagnosed(capfd, before, write(tmp_path / "tuned.gguf", tuned, kind, architecture), *words)
    assert found["tuned"] == "tuned.gguf" and not found["identical"]
    assert found["tensors"] == dense["tensors"]
    assert found["movers"] == dense["movers"]
    for measure in ("rank", "landing"):
        assert [row | {"rounding_ratio": 0} for row in found[measure]["tensors"]] == [
            row | {"rounding_ratio": 0} for row in dense[measure]["tensors"]
        ]
    same = write(tmp_path / "same.gguf", base, kind, architecture)
    assert diagnosed(capfd, before, same, "--measures", "sparsity", "--exit-code")["identical"]


def test_what_is_not_read_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights) -> None:
    wide = base | {"model.embed_tokens.weight": torch.zeros(12, 32).bfloat16()}
    before = folder(tmp_path / "base", wide)
    quantised = write(tmp_path / "q8.gguf", {name: torch.zeros(len(one), 32) for name, one in wide.items()}, "Q8_0")
    said = diagnosed(capfd, before, quantised, code=2)
    assert "q8.gguf is quantised: of 10 tensors 10 in Q8_0, first blk.0.attn_k.weight" in said
    said = diagnosed(capfd, before, write(tmp_path / "gpt2.gguf", base, "F32", "gpt2"), code=2)
    assert "GGUF files of gpt2 are not read" in said
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF" + bytes(7))
    assert "torn.gguf is not a readable GGUF file" in diagnosed(capfd, before, torn, code=2)


def test_without_the_package_it_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], base: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    said = diagnosed(capfd, folder(tmp_path / "base", base), tmp_path / "m.gguf", code=2)
    assert "m.gguf needs the gguf package" in said and "fix: pip install 'ssrctl[gguf]'" in said


def test_functions_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = Path(ssrctl.__file__).parent / "tiny_reasoner" / "weights"
    weights = load_file(base / "model.safetensors")
    for name, change in (("same", 0.0), ("other", 0.1)):
        tuned = {key: one + change * (one.dim() == 1) for key, one in weights.items()}
        file = write(tmp_path / f"{name}.gguf", tuned, "F32", "qwen3")
        found = diagnosed(capfd, base, file, "--measures", "function", "--prompts", "tiny-reasoner")
        (kl,) = [one["kl_base_tuned"]["value"] for one in found["function"]["checkpoints"]]
        assert (abs(kl) < 1e-8) == (change == 0)
