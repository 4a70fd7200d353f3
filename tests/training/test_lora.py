"""LoRA through peft in the training loop, next to plain peft, autograd and torch's AdamW."""

import filecmp
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from reference.unit_gradients import CASES, assert_close, build, expected_gradient, found_gradients

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.cli import main
from ssrctl.configs import TrainConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.jsonl import read_jsonl
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.stages import train
from ssrctl.training import training_step
from ssrctl.training.lora import add_adapters

peft = pytest.importorskip("peft")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

TRAINED = {
    "lora_r": 4, "learning_rate": 1e-2, "questions_per_step": 2, "num_generations": 4, "max_new_tokens": 48, "credit": "final",
    "importance_level": "token", "loss_type": "grpo", "seed": 1,
}  # fmt: skip


def config(out, **changes):
    return TrainConfig(output_dir=out, **TRAINED | changes)


def plain():
    """The bundled model with adapters, by peft alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path()).eval()
    torch.manual_seed(derive_seed(1, "lora"))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, a checkpoint after each, and the batches that it learned from."""
    run, seen = tmp_path_factory.mktemp("lora") / "run", []
    original = training_step.unit_gradients

    def noting(model, batch, units, **settings):
        seen.append((batch, units))
        return original(model, batch, units, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "unit_gradients", noting)
        patch.setattr(train, "write_last_page", lambda make, page: None)
        train.run(config(run, max_steps=3, save_steps=1))
    return run, seen


def test_steps_are_those_of_peft_autograd_and_adamw(trained):
    run, seen = trained
    model = plain()
    before = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batches = iter(seen)
    for row, folder in zip(
        (row for _, row in read_jsonl(run / "metrics.jsonl")), RunDir(run).checkpoints(), strict=True
    ):
        for _ in range(row["num_units"]):
            batch, (unit,) = next(batches)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
            logprobs, kept = logprobs[:, batch.prompt_length - 1 :], batch.known
            # sampled by the adapters in force
            assert torch.allclose(logprobs[kept], batch.old_logprobs[kept], atol=1e-4)
            ratio = torch.where(kept, (logprobs - batch.old_logprobs).exp(), 0.0)
            each = ratio.sum(1) / kept.sum(1) * torch.tensor(unit.advantages[0])
            (-each.mean() / TRAINED["questions_per_step"]).backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        expected = peft.get_peft_model_state_dict(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-4), name  # a hundredth of a step
    assert next(batches, None) is None
    assert all((found[name] - tensor).abs().max() > 5e-3 for name, tensor in before.items())


def test_the_delta_is_the_merged_adapter_and_other_commands_read_it(trained, tmp_path, capsys):
    run, _ = trained
    base = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path())
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    folder = RunDir(run).checkpoints()[-1]
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    assert main(["delta", "apply", "tiny-reasoner", str(run), "-o", str(tmp_path / "applied")]) == 0
    applied = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "applied").named_parameters())
    changed = set()
    for name, parameter in merged.named_parameters():
        assert torch.equal(applied[name], parameter), name
        if not torch.equal(parameter, before[name]):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "v_proj"}
    merged.save_pretrained(tmp_path / "merged")
    for file in tiny_reasoner.path().iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, tmp_path / "merged")
    rows = []
    for given in (["--checkpoint", str(run)], ["--model", str(tmp_path / "merged")]):
        out = tmp_path / str(len(rows))
        tail = ["--limit", "4", "--num-samples", "2", "--max-new-tokens", "48", "--no-report", "--output-dir", str(out)]
        assert main(["eval", *given, *tail]) == 0
        rows.append([row["response"] for _, row in read_jsonl(out / "samples.jsonl")])
    assert rows[0] == rows[1]
    assert main(["mask", "diff", "tiny-reasoner", str(run), "-o", str(tmp_path / "mask.safetensors")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(trained, tmp_path, dtype):
    run, _ = trained
    more = {"max_steps": 3, "save_steps": 1}
    if dtype == "bfloat16":
        run, more = tmp_path / "run", more | {"dtype": dtype, "beta": 0.1, "num_iterations": 2}
        train.run(config(run, **more))
    again = tmp_path / "again" / "run"  # whose name the delta has
    shutil.copytree(run, again)
    for folder in RunDir(again).checkpoints()[2:]:  # the first step has no signal
        shutil.rmtree(folder)
    train.run(config(again, **more, resume_from_checkpoint="latest"))
    first, second = (RunDir(one).checkpoints()[-1] for one in (run, again))
    files = sorted(str(file.relative_to(first)) for file in first.rglob("*") if file.is_file())
    assert len(files) == 6
    assert filecmp.cmpfiles(first, second, files, shallow=False) == (files, [], [])
    if dtype == "bfloat16":  # the start model is the one whose adapters add nothing
        rows = [row["kl_to_start"] for _, row in read_jsonl(run / "metrics.jsonl")]
        assert abs(rows[1]) < 1e-3 < rows[2]  # no question of step 1 has a signal


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_every_exact_way_gives_the_gradients_of_the_adapters(kind):
    model = build(kind)
    loaded = LoadedModel(model, None, ModelIdentity(name=kind, revision=None, fingerprint=""), None)
    adapted = add_adapters(loaded, TrainConfig(lora_r=2, lora_target_modules=["all-linear"]))
    model.double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    case = CASES["ragged"].near(model)
    expected = [expected_gradient(model, case, unit, "sequence") for unit in case.units]
    assert all(len(one) == 2 * len(adapted.layers) for one in expected)
    for method in ("kept", "truncated", "chunked", "recomputed", "accumulated"):
        found = found_gradients(model, case, method)
        for (_, mine), wanted in zip(found, expected, strict=True):
            assert_close(mine, wanted)


def test_a_plan_counts_what_is_trained(capsys, monkeypatch):
    monkeypatch.setattr(train, "memory_facts", lambda *_: {})  # tests/training/test_memory_plan.py
    plan = train.run(TrainConfig(lora_r=4, lora_target_modules=["all-linear"], dry_run=True))
    adapted = add_adapters(load_model(TrainConfig()), TrainConfig(lora_r=4, lora_target_modules=["all-linear"]))
    trained = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    assert plan["trained"] == trained == adapted.num_trained < plan["parameters"] / 10
    # a gradient, the sum of gradients, two moments and the adapters themselves, in float32
    expected = 4 * (plan["parameters"] + 5 * trained) / 2**30
    assert plan["gib_for_weights_and_updates"] == round(expected, 3)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"optimizer": "kronos"}, "--optimizer kronos does not work with --lora-r: adapters are trained whole"),
        ({"mask": "m"}, "--mask does not work with --lora-r: it is for the model's own weights"),
        ({"protect": "m"}, "--protect does not work"),
        ({"budget": 0.1}, "--budget does not work"),
        ({"sharding": "fsdp2", "num_processes": 2}, "--sharding does not work"),
        ({"rollout_engine": "vllm-server", "rollout_server_url": ["http://x"]}, "--rollout-engine does not work"),
        ({"allocation": "overlap"}, "--allocation has no meaning for adamw"),
        ({"lora_r": None, "lora_alpha": 16}, "--lora-alpha is for --lora-r"),
        ({"lora_r": None, "lora_target_modules": ["q_proj"]}, "--lora-target-modules is for --lora-r"),
    ],
)
def test_what_adapters_exclude_is_refused_in_one_line(given, reason):
    with pytest.raises(UserError, match=reason):
        TrainConfig(**{"lora_r": 8} | given)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (["q_proj", "queries"], "no layer is called 'queries'"),
        (["queries"], "peft cannot adapt"),
        (["lm_head"], r"would adapt lm_head \(Linear\)"),
        (["embed_tokens", "q_proj"], r"would adapt model.embed_tokens \(Embedding\)"),
    ],
)
def test_names_of_layers_are_checked(named, reason):
    with pytest.raises(UserError, match=reason):
        add_adapters(load_model(TrainConfig()), TrainConfig(lora_r=2, lora_target_modules=named))


def test_a_missing_peft_and_another_adapter_are_named(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    folder = RunDir(run).checkpoints()[-1]
    shutil.rmtree(folder / "adapter")
    (folder / "adapter").mkdir()
    shutil.copy(folder / "delta.safetensors", folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is not a adapter file.*newest whole checkpoint is .*000002"):
        train.run(config(run, max_steps=3, save_steps=1, resume_from_checkpoint="latest"))
    shutil.rmtree(folder / "adapter")
    with pytest.raises(UserError, match="holds 0 tensors of adapters, not the"):
        train.run(config(run, max_steps=3, save_steps=1, resume_from_checkpoint="latest"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="--lora-r needs peft") as caught:
        train.run(config(tmp_path / "none"))
    assert "pip install" in caught.value.remedy
    assert not Path(tmp_path / "none").exists()
    json.dumps(caught.value.message)
