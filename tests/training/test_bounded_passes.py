"""Activation checkpointing and micro-batches: the gradients of one plain batch, with less kept at a time."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from reference.unit_gradients import CASES, assert_close, build, expected_gradient, found_gradients, taken

from ssrctl.configs import TrainConfig
from ssrctl.core.losses import response_weights
from ssrctl.core.mask import BlockMask
from ssrctl.core.units import Unit
from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_mask
from ssrctl.io.jsonl import read_jsonl
from ssrctl.models.loading import load_model
from ssrctl.stages import train
from ssrctl.training.checkpointing import enable_checkpointing, is_checkpointed
from ssrctl.training.step_gradients.accumulated import micro_batches
from ssrctl.training.unit_gradients import GradientTask, automatic_method, unit_gradients


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


def saved_bytes(model, case, method):
    """The bytes that autograd keeps for one question's backward passes, parameters left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    total = 0

    def pack(tensor):
        nonlocal total
        total += 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next(unit_gradients(model, case.batch(), case.units[:1], method=method))
    taken(model)
    return total


@pytest.mark.parametrize("method", ["kept", "truncated", "accumulated"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_checkpointing_keeps_less_and_changes_no_bit(kind, method):
    plain, model = (build(kind, **({"resid_pdrop": 0.5, "attn_pdrop": 0.5} if kind == "gpt2" else {})) for _ in "ab")
    case = CASES["ragged"].near(plain)
    enable_checkpointing(model)
    enable_checkpointing(model)
    assert not model.training and is_checkpointed(model) and not is_checkpointed(plain)
    expected, found = (found_gradients(one, case, method) for one in (plain, model))
    for (unit, wanted), (same, gradient) in zip(expected, found, strict=True):
        assert unit == same and wanted.keys() == gradient.keys()
        assert all(torch.equal(wanted[name], gradient[name]) for name in wanted)
    assert saved_bytes(model, case, method) < 0.5 * saved_bytes(plain, case, method)


def test_checkpointing_leaves_the_cache_of_sampling_and_excludes_that_of_gradients():
    plain, model = build("llama"), build("llama")
    case = CASES["ragged"].near(plain)
    enable_checkpointing(model)
    prompt = {"input_ids": torch.tensor([case.prompt]), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt), plain.generate(**prompt))
    with torch.no_grad():
        assert model(torch.tensor([case.prompt]), use_cache=True).past_key_values.get_seq_length() == len(case.prompt)
    with pytest.raises(UserError, match="gradient checkpointing is on"):
        unit_gradients(model, case.batch(), case.units, method="chunked")
    assert automatic_method(GradientTask(model, case.batch(), case.units)) in ("kept", "truncated")


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no layers that can be checkpointed"):
        enable_checkpointing(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "level", "tokens"),
    [
        *((name, "sequence", 16) for name in CASES),
        ("ragged", "token", 1),
        ("ragged", "step", 22),
        ("fused", "step", 999),
    ],
)
def test_micro_batches_add_up_to_the_gradient_of_one_batch(qwen, name, level, tokens):
    case = CASES[name].near(qwen)
    joined = [u for unit in case.units for u in zip(unit.steps, unit.advantages, strict=True)]
    case.units = [*case.units, Unit(*([s for s, _ in joined],), 0.01, tuple(a for _, a in joined))]
    for units in (case.units, case.units[-1:]):  # several passes over the batches, and one
        case.units, heard, seen = units, [], []
        options = {
            "micro_batch_tokens": tokens,
            "on_unit": heard.append,
            "on_logprobs": seen.append,
        }
        for unit, gradient in found_gradients(qwen, case, "accumulated", level, **options):
            assert_close(gradient, expected_gradient(qwen, case, unit, level))
        assert heard == units
        whole, parts = ([], [])
        for made, method, more in ((whole, "kept", {}), (parts, "accumulated", options)):
            made += unit_gradients(qwen, case.batch(), units, level=level, method=method, **more)
            taken(qwen)
        kept = []
        list(unit_gradients(qwen, case.batch(), units, method="kept", on_logprobs=kept.append))
        taken(qwen)
        known = case.batch().known
        torch.testing.assert_close(seen[0][known], kept[0].to(seen[0].dtype)[known], rtol=0, atol=1e-12)
        for one, other in zip(whole, parts, strict=True):
            assert (one.num_terms, one.num_clipped) == (other.num_terms, other.num_clipped)
            assert one.loss == pytest.approx(other.loss, abs=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_keep_the_weights_of_other_losses_and_the_kl_term(qwen, loss_type):
    case = CASES["fused"].near(qwen)
    batch = case.batch()
    batch = dataclasses.replace(batch, reference=batch.old_logprobs - 0.1)
    weights = response_weights(loss_type, batch.known.sum(1), longest=9, batch_tokens=7.0)
    gradients = {}
    for method in ("kept", "accumulated"):
        found = unit_gradients(
            qwen, batch, case.units, level="token", method=method, micro_batch_tokens=1, token_weights=weights, beta=0.1
        )
        gradients[method] = [(made.loss, taken(qwen)) for made in found]
    for (loss, wanted), (same, gradient) in zip(gradients["kept"], gradients["accumulated"], strict=True):
        assert same == pytest.approx(loss, abs=1e-12)
        assert_close(gradient, wanted)


def test_micro_batches_hold_the_limit_and_every_response_once():
    batch = CASES["ragged"].batch()  # a prompt of 3, responses of 8, 4 and 6 tokens
    rows = {limit: [part.tolist() for part in micro_batches(batch, limit)] for limit in (1, 17, 18, 22, 33)}
    assert rows[1] == [[0], [2], [1]]
    assert rows[17] == [[0], [2], [1]]
    assert rows[18] == [[0], [1, 2]]
    assert rows[22] == [[0, 2], [1]]
    assert rows[33] == [[0, 1, 2]]


@pytest.mark.parametrize("update", ["adamw", "masked", "pooled"])
def test_runs_in_bounded_passes_learn_alike(tmp_path: Path, update: str) -> None:
    changes: dict = {
        "adamw": {"optimizer": "adamw"},
        "masked": {"mask": tmp_path / "mask.safetensors"},
        "pooled": {"allocation": "pooled"},
    }[update]
    if update == "masked":
        loaded = load_model(TrainConfig())
        chosen = {name: torch.arange(0, math.prod(shape), 3) for name, shape in loaded.shapes().items()}
        mask = BlockMask.from_indices(loaded.shapes(), chosen)
        save_mask(changes["mask"], mask, mask_kind="random", model=loaded.identity, settings={})
    rows = []
    for name, bounded in {"plain": {}, "bounded": {"gradient_checkpointing": True, "micro_batch_tokens": 120}}.items():
        run = tmp_path / name
        small = {
            "questions_per_step": 1,
            "num_generations": 4,
            "max_new_tokens": 32,
            "max_steps": 1,
            "log_masks_every": 0,
        }
        train.run(TrainConfig(output_dir=run, budget_profile="flat", **small, **changes, **bounded))
        rows += [row for _, row in read_jsonl(run / "metrics.jsonl")]
    plain, bounded = rows
    assert plain["grad_norm"] > 0 and plain["num_units"] == bounded["num_units"]
    # float32 sums in another order
    for key in ("loss", "grad_norm", "clip_scale", "updated_frac", "logprob_gap_mean"):
        assert bounded[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": True, "step_gradient": "chunked"}, "chunked keeps keys and values in a cache"),
        ({"gradient_checkpointing": True, "step_gradient": "local"}, "local keeps keys and values in a cache"),
        ({"micro_batch_tokens": 99, "step_gradient": "kept"}, "kept runs all responses of a question together"),
        ({"micro_batch_tokens": 99, "scope": "tensor"}, "--scope tensor selects from each gradient"),
        ({"micro_batch_tokens": 0}, "--micro-batch-tokens must be at least 1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)
