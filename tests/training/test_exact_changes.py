"""What is left of the touched coordinates when those that are stored as before are taken out."""

import torch
from safetensors.torch import load_file, save_file

from ssrctl import tiny_reasoner
from ssrctl.configs import ModelConfig
from ssrctl.training.exact_changes import exact_changes

NAME = "model.layers.0.mlp.up_proj.weight"


def base(dtype):
    return load_file(tiny_reasoner.path() / "model.safetensors")[NAME].flatten().to(dtype)


def test_only_coordinates_that_differ_stay():
    for dtype in (torch.float32, torch.bfloat16):
        weights = base(dtype)
        indices = torch.tensor([0, 5, 7, 900])
        values = weights[indices].clone()
        values[1] = -values[1]
        values[3] += 1
        config = ModelConfig(dtype=str(dtype).removeprefix("torch."))
        found, before = exact_changes({NAME: (indices, values)}, config)
        assert found[NAME][0].tolist() == [5, 900]
        assert torch.equal(found[NAME][1], values[[1, 3]]) and torch.equal(before[NAME], weights[[5, 900]])


def test_a_tensor_that_is_as_before_is_left_out_and_a_sign_of_zero_counts(tmp_path):
    weights = base(torch.bfloat16)
    indices = torch.arange(10)
    assert exact_changes({NAME: (indices, weights[:10].clone())}, ModelConfig(dtype="bfloat16")) == ({}, {})
    assert exact_changes({}, ModelConfig()) == ({}, {})
    tensors = load_file(tiny_reasoner.path() / "model.safetensors")
    tensors[NAME].view(-1)[0] = 0.0
    save_file(tensors, tmp_path / "model.safetensors")
    found, _ = exact_changes({NAME: (indices[:1], torch.tensor([-0.0]))}, ModelConfig(model=str(tmp_path)))
    assert found[NAME][0].tolist() == [0]


def test_a_base_without_safetensors_keeps_everything(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    given = {NAME: (torch.arange(3), base(torch.float32)[:3].clone())}
    assert exact_changes(given, ModelConfig(model=str(tmp_path))) == (given, None)


def test_files_that_do_not_fit_the_parameters_keep_everything(tmp_path):
    save_file({"experts.0.up.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    given = {NAME: (torch.arange(3), base(torch.float32)[:3].clone())}
    assert exact_changes(given, ModelConfig(model=str(tmp_path))) == (given, None)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert exact_changes(given, ModelConfig(model=str(tmp_path))) == (given, None)
    assert exact_changes(given, ModelConfig(model="no-such/model")) == (given, None)
