"""Changed weights as masks: tensors that come in pieces, and bases that are rounded on loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssrctl import tiny_reasoner
from ssrctl.checkpoints import tensor_files
from ssrctl.checkpoints.delta import Delta, save_delta
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.model_folder import copy_companions
from ssrctl.configs import MaskDiffConfig, ModelConfig
from ssrctl.io.artifacts import load_mask, load_mask_for
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.stages.mask import run_diff

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, LoadedModel]:
    """The bundled reasoner, stored in float32 but loaded in bfloat16, as its config then asks for."""
    folder = tmp_path / "base"
    folder.mkdir()
    copy_companions(tiny_reasoner.path(), folder)
    save_file(
        load_file(tiny_reasoner.path() / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder, load_model(ModelConfig(model=str(folder), dtype="float32"))


def diff(base: Path, tuned: Path, output: Path) -> dict[str, set[int]]:
    """What `mask diff` selects, by tensor; nothing of the others."""
    run_diff(MaskDiffConfig(base=base, tuned=tuned, output=output, json=True))
    mask = load_mask(output)[0]
    return {name: set(tiles.to_indices().tolist()) for name, tiles in mask.tensors.items() if tiles.count()}


def test_tensors_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.arange(7.0), "b": torch.arange(20.0).view(4, 5), "c": torch.tensor(1.0), "d": torch.ones(0)}
    tuned = {name: one.clone() for name, one in weights.items()}
    for name, places in {"a": [6], "b": [0, 2, 3, 5, 19], "c": [0]}.items():
        tuned[name].view(-1)[places] += 1
    for name, tensors in (("base", weights), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(tensor_files, "PIECE_ELEMENTS", 3)
    found = diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "m")
    assert found == {"a": {6}, "b": {0, 2, 3, 5, 19}, "c": {0}}
    metadata = load_mask(tmp_path / "m")[1]
    assert json.loads(metadata["model"])["fingerprint"] == fingerprint(weights.items())
    assert json.loads(metadata["settings"])["tuned_model"]["fingerprint"] == fingerprint(tuned.items())


def test_a_pair_is_compared_with_the_base_as_it_is_loaded(tmp_path: Path, base: tuple[Path, LoadedModel]) -> None:
    """Rounding on loading is no change; and the mask is of the weights that training starts from."""
    folder, loaded = base
    tuned = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    tuned[UP].view(-1)[[4, 9]] += 1
    for dtype in (torch.float32, torch.bfloat16):
        save_file({name: one.to(dtype) for name, one in tuned.items()}, tmp_path / "tuned.safetensors")
        assert diff(folder, tmp_path / "tuned.safetensors", tmp_path / "m") == {UP: {4, 9}}
        load_mask_for(tmp_path / "m", loaded.shapes(), loaded.identity.fingerprint)


def test_a_delta_is_compared_with_the_base_as_it_was_loaded(tmp_path: Path, base: tuple[Path, LoadedModel]) -> None:
    folder, loaded = base
    values = dict(loaded.model.named_parameters())[UP].detach().flatten()[[4, 9]].clone()
    values[1] += 1
    delta = Delta(loaded.identity, loaded.shapes(), {UP: (torch.tensor([4, 9]), values)})
    save_delta(tmp_path / "delta.safetensors", delta)
    assert diff(folder, tmp_path / "delta.safetensors", tmp_path / "m") == {UP: {9}}
    load_mask_for(tmp_path / "m", loaded.shapes(), loaded.identity.fingerprint)
