"""Deltas as vLLM's sparse weight patches: the format, and what a server makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ssrctl.checkpoints.delta import Delta, changed_indices
from ssrctl.checkpoints.export import SparsePatch, vllm_sparse_patches, vllm_update_info
from ssrctl.io.artifacts import ModelIdentity

BASE = ModelIdentity(name="tiny", revision=None, fingerprint="xxh3:base")
LAYER = "model.layers.0."
# 3 query rows per 2 key rows, as with grouped heads; two input columns, so that rows and flat indices differ
SHAPES = {
    "model.embed_tokens.weight": (5, 2),
    f"{LAYER}self_attn.q_proj.weight": (6, 2),
    f"{LAYER}self_attn.k_proj.weight": (2, 2),
    f"{LAYER}self_attn.v_proj.weight": (3, 2),
    f"{LAYER}self_attn.q_proj.bias": (6,),
    f"{LAYER}self_attn.k_proj.bias": (2,),
    f"{LAYER}self_attn.v_proj.bias": (3,),
    f"{LAYER}self_attn.o_proj.weight": (2, 6),
    f"{LAYER}mlp.gate_proj.weight": (4, 2),
    f"{LAYER}mlp.up_proj.weight": (4, 2),
    f"{LAYER}mlp.down_proj.weight": (2, 4),
    "model.norm.weight": (2,),
}


def delta_of(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> Delta:
    changes = {}
    for name, tensor in tuned.items():
        indices = changed_indices(base[name], tensor)
        if len(indices):
            changes[name] = (indices, tensor.flatten()[indices])
    return Delta(BASE, {name: tuple(tensor.shape) for name, tensor in base.items()}, changes)


def pair(seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tuned = {}
    for name, tensor in base.items():
        keep = torch.rand(tensor.shape, generator=generator) < 0.6
        tuned[name] = torch.where(keep, tensor, torch.randn(tensor.shape, generator=generator).to(dtype))
    return base, tuned


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a one-rank server, written out by hand."""
    attention, mlp = f"{LAYER}self_attn.", f"{LAYER}mlp."
    made = {name: weights[name].clone() for name in SHAPES if not name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}  # fmt: skip
    for kind in ("weight", "bias"):
        made[f"{attention}qkv_proj.{kind}"] = torch.cat([weights[f"{attention}{one}_proj.{kind}"] for one in "qkv"])
    made[f"{mlp}gate_up_proj.weight"] = torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]])
    return made


def patched(weights: dict[str, Tensor], patches: list[SparsePatch]) -> dict[str, Tensor]:
    """What the server does, one entry at a time."""
    after = {name: tensor.clone() for name, tensor in weights.items()}
    for patch in patches:
        assert tuple(after[patch.name].shape) == patch.full_shape
        flat = after[patch.name].view(-1)
        for index, value in zip(patch.indices.tolist(), patch.values, strict=True):
            flat[index] = value
    return after


def assert_format(patches: list[SparsePatch], dtype: torch.dtype) -> None:
    assert [patch.name for patch in patches] == sorted({patch.name for patch in patches})
    for patch in patches:
        assert patch.indices.dtype == torch.int32 and patch.values.dtype == dtype
        assert patch.indices.dim() == patch.values.dim() == 1
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        listed = patch.indices.tolist()
        assert listed == sorted(set(listed)) and len(listed) == len(patch.values) > 0


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_server_with_the_base_ends_with_the_tuned_model(seed: int, dtype: torch.dtype) -> None:
    base, tuned = pair(seed, dtype)
    delta = delta_of(base, tuned)
    by_name = vllm_sparse_patches(delta)
    assert_format(by_name, dtype)
    assert {patch.name for patch in by_name} == set(delta.changes)
    after = patched(base, by_name)
    assert all(torch.equal(after[name], tuned[name]) for name in SHAPES)
    at_run_time = vllm_sparse_patches(delta, layout="runtime")
    assert_format(at_run_time, dtype)
    after = patched(fused(base), at_run_time)
    assert all(torch.equal(after[name], tensor) for name, tensor in fused(tuned).items())


def test_the_fields_are_those_of_the_sparse_nccl_backend() -> None:
    changes = {
        f"{LAYER}self_attn.k_proj.weight": (torch.tensor([0, 3]), torch.tensor([1.0, 2.0]).bfloat16()),
        f"{LAYER}self_attn.v_proj.weight": (torch.tensor([5]), torch.tensor([3.0]).bfloat16()),
        "model.norm.weight": (torch.tensor([1]), torch.tensor([4.0]).bfloat16()),
    }
    delta = Delta(BASE, SHAPES, changes)
    patches = vllm_sparse_patches(delta)
    assert list(patches[0]._asdict()) == ["name", "indices", "values", "full_shape"]
    info = vllm_update_info(patches)
    assert json.loads(json.dumps(info)) == {
        "names": [f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight", "model.norm.weight"],
        "dtype_names": ["bfloat16"] * 3,
        "shapes": [[2, 2], [3, 2], [2]],
        "num_updates_list": [2, 1, 1],
    }
    # k begins behind 6 rows of q, v behind 2 more, two columns each
    runtime = vllm_sparse_patches(delta, layout="runtime")
    assert [(patch.name, patch.indices.tolist(), patch.full_shape) for patch in runtime] == [
        (f"{LAYER}self_attn.qkv_proj.weight", [12, 15, 21], (11, 2)),
        ("model.norm.weight", [1], (2,)),
    ]
    assert runtime[0].values.tolist() == [1.0, 2.0, 3.0]


def test_an_up_projection_without_a_gate_is_not_fused() -> None:
    delta = Delta(BASE, {"h.up_proj.weight": (2, 2)}, {"h.up_proj.weight": (torch.tensor([3]), torch.ones(1))})
    (patch,) = vllm_sparse_patches(delta, layout="runtime")
    assert (patch.name, patch.indices.tolist()) == ("h.up_proj.weight", [3])


def test_joined_experts_become_the_tensors_of_the_base(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuned = {name: tensor + (torch.rand(tensor.shape) < 0.3) for name, tensor in base.items()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tuned[name])
    model.save_pretrained(tmp_path / "tuned")
    delta = delta_of(base, tuned)
    with pytest.raises(ValueError, match=r"experts\.\w+ joins the experts of a checkpoint.*give base=FOLDER"):
        vllm_sparse_patches(delta)
    patches = vllm_sparse_patches(delta, base=tmp_path / "base")
    assert_format(patches, torch.float32)
    after = patched(load_file(tmp_path / "base" / "model.safetensors"), patches)
    wanted = load_file(tmp_path / "tuned" / "model.safetensors")
    assert after.keys() == wanted.keys() and all(torch.equal(after[name], wanted[name]) for name in wanted)
    assert sum(".experts." in patch.name for patch in patches) == 9
    other = Delta(BASE, {"model.norm.weight": (9,)}, {"model.norm.weight": (torch.tensor([0]), torch.ones(1))})
    with pytest.raises(ValueError, match=r"has no tensors that make up model.norm.weight of shape \[9\]"):
        vllm_sparse_patches(other, base=tmp_path / "base")


def test_nothing_changed_gives_no_patch() -> None:
    empty = (torch.empty(0, dtype=torch.int64), torch.empty(0))
    for layout in ("checkpoint", "runtime"):
        assert vllm_sparse_patches(Delta(BASE, SHAPES, {}), layout=layout) == []  # type: ignore[arg-type]
        assert vllm_sparse_patches(Delta(BASE, SHAPES, {"model.norm.weight": empty}), layout=layout) == []  # type: ignore[arg-type]


def one(value: float, index: int = 1, shape: tuple[int, ...] = (2,)) -> Delta:
    return Delta(BASE, {"w": shape}, {"w": (torch.tensor([index]), torch.tensor([value]))})


def test_values_are_rounded_to_what_the_server_holds() -> None:
    (patch,) = vllm_sparse_patches(one(1.00390625), dtype=torch.bfloat16)  # 1 + 2^-8 lies halfway: ties to even
    assert patch.values.dtype == torch.bfloat16 and patch.values.tolist() == [1.0]
    with pytest.raises(ValueError, match="w: 1 of 1 new values are beyond the range of float16"):
        vllm_sparse_patches(one(1e6), dtype=torch.float16)
    (patch,) = vllm_sparse_patches(one(float("inf")), dtype=torch.float16)
    assert patch.values.tolist() == [float("inf")]


def test_what_the_format_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="w: 1 of 1 new values are NaN, which vLLM takes as unchanged"):
        vllm_sparse_patches(one(float("nan")))
    assert vllm_sparse_patches(one(float("nan")), layout="runtime")[0].values.isnan().all()
    assert vllm_sparse_patches(one(1.0, 2**31 - 1, (2**16, 2**16)))[0].indices.tolist() == [2**31 - 1]
    with pytest.raises(ValueError, match="index 2147483648 does not fit int32"):
        vllm_sparse_patches(one(1.0, 2**31, (2**16, 2**16)))
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    delta = Delta(BASE, {name: (2, 2)}, {name: (torch.tensor([0]), torch.ones(1))})
    assert vllm_sparse_patches(delta)[0].name == name
    with pytest.raises(ValueError, match="use layout='checkpoint'"):
        vllm_sparse_patches(delta, layout="runtime")
