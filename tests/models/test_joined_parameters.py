"""Models whose tensors transformers renames, joins or splits on loading: names and values map both ways, bit for bit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference.critics import FunctionCritic
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssrctl.checkpoints.conversion import empty_model, parameter_parts
from ssrctl.checkpoints.delta import DeltaFile
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.names import NameMap, Part
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.checkpoints.run_dir import newest_checkpoint
from ssrctl.cli import main
from ssrctl.configs import DeltaApplyConfig, EvalConfig, MaskRandomConfig, TrainConfig
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_mask
from ssrctl.io.records import Rollout, StepScore
from ssrctl.models.stored_parameters import check_exportable, stored_parameters
from ssrctl.stages import delta, mask, train
from ssrctl.stages import eval as evaluation

TOKENS: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SMALL: dict[str, Any] = TOKENS | {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SMALL, **LINEAR, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=24
    ),
    "gpt2": lambda: transformers.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "mamba": lambda: transformers.MambaConfig(**TOKENS, hidden_size=32, state_size=8, num_hidden_layers=2),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16
    ),
}  # fmt: skip
JOINED = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "qwen3_next", "minimax"]
ALWAYS = ("mixtral", "gpt_neox")  # the rest of the matrix takes minutes


def saved(kind: str, folder: Path, **settings: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(folder, **settings)
    return folder


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_parameters_are_read_as_transformers_loads_them(tmp_path: Path, kind: str) -> None:
    folder = saved(kind, tmp_path / kind)
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())
    with TensorReader(folder) as reader:
        stored = stored_parameters(reader)
        assert set(stored.names) == loaded.keys()
        assert bool(reader.name_map.joined) == (kind in JOINED)
        for name, parameter in loaded.items():
            assert torch.equal(reader.tensor(name), parameter)
            start, stop = parameter.numel() // 3, parameter.numel() - 1
            assert torch.equal(torch.cat([*reader.pieces(name, start, stop)]), parameter.flatten()[start:stop])
        check_exportable(folder, stored.shapes, fingerprint(loaded.items()))


def test_shards_that_cut_through_experts(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "m", max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    with TensorReader(folder) as reader:
        reader.align(loaded)
        assert all(torch.equal(reader.tensor(name), parameter) for name, parameter in loaded.items())


def test_the_map_is_made_of_rows(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "m")
    with TensorReader(folder) as reader:
        shapes = dict(reader.shapes)
    experts = "model.layers.1.block_sparse_moe.experts"
    parts = parameter_parts(empty_model(folder), shapes)["model.layers.1.mlp.experts.gate_up_proj"]
    assert parts[:3] == (
        Part(f"{experts}.0.w1.weight", 0, 768), Part(f"{experts}.0.w3.weight", 0, 768), Part(f"{experts}.1.w1.weight", 0, 768)
    )  # fmt: skip


def test_what_is_split_maps_back() -> None:
    parts = {
        "q": (Part("qkv", 0, 4),),
        "k": (Part("qkv", 4, 2),),
        "b": (Part("old", 0, 3),),
        "odd": (Part("half", 0, 1),),
    }
    names = NameMap.converted(parts, {"qkv": 6, "old": 3, "half": 2})
    assert names.joined.keys() == {"q", "k"} and names.renamed == {"old": "b"}
    assert names.parts_of("qkv") == [Part("q", 0, 4), Part("k", 0, 2)] and names.parts_of("old") == []


def score(rollout: Rollout, index: int) -> StepScore:
    """Score by the text alone; the last step counts as a marked answer, since a random model marks none."""
    assert rollout.steps
    rollout.steps[-1].kind = "final"
    reward = zlib.crc32(f"{index}{rollout.response}".encode(errors="replace")) % 101 / 50 - 1
    return StepScore(score=50 + 50 * reward, reward=reward, rationale=None, error=None)


@pytest.fixture
def trained(tmp_path: Path, bpe_tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """Make a model and train it for a step; gives (base, run)."""

    def make(kind: str, **settings: Any) -> tuple[Path, Path]:
        base, run = saved(kind, tmp_path / kind, max_shard_size="40KB"), tmp_path / f"run-{kind}"
        bpe_tokenizer.save_pretrained(base)
        monkeypatch.setattr(train, "make_critic", lambda options, resources: FunctionCritic(score))
        train.run(
            TrainConfig(
                model=str(base), output_dir=run, budget_profile="flat", questions_per_step=1, num_generations=3,
                max_new_tokens=12, advantage="group", device="cpu", **{"max_steps": 1, "learning_rate": 0.01} | settings,
            )
        )  # fmt: skip
        return base, run

    return make


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ALWAYS else pytest.mark.slow) for kind in sorted(CONFIGS)]
)
def test_a_run_is_applied_and_samples_the_same(trained, tmp_path: Path, kind: str) -> None:
    base, run = trained(kind)
    assert DeltaFile(newest_checkpoint(run) / "delta.safetensors").count > 100
    applied = tmp_path / "applied"
    delta.run_apply(DeltaApplyConfig(base=base, delta=run, output=applied, json=True))
    assert sorted(one.name for one in applied.glob("*.safetensors")) == sorted(
        o.name for o in base.glob("*.safetensors")
    )
    for number, model in enumerate((applied, run)):
        settings = EvalConfig(
            model=str(model), output_dir=tmp_path / f"e{number}", limit=2, num_samples=2, max_new_tokens=12, json=True,
            device="cpu",
        )  # fmt: skip
        evaluation.run(settings)
    assert (tmp_path / "e0/samples.jsonl").read_bytes() == (tmp_path / "e1/samples.jsonl").read_bytes()


def test_diagnose_and_masks_of_a_mixture(trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mask.safetensors"
    base = saved("mixtral", tmp_path / "same")
    mask.run_random(MaskRandomConfig(model=str(base), output=path, density=0.1, json=True))
    held, _ = load_mask(path)
    base, run = trained("mixtral", protect=path, scope="tensor")
    changes = DeltaFile(newest_checkpoint(run) / "delta.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert name in changes.counts
    assert not any(held.to_dense()[name].flatten()[indices].any() for indices, _ in changes.blocks(name))
    capfd.readouterr()
    assert main(["diagnose", str(base), str(run), "-o", str(tmp_path / "report"), "--json"]) == 0
    assert name in json.dumps(json.loads(capfd.readouterr().out))


def test_a_run_that_could_not_be_exported_is_refused_before_its_first_step(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "m")
    with TensorReader(folder) as reader:
        shapes = dict(stored_parameters(reader).shapes)
    with pytest.raises(UserError, match=r"cannot be trained: 1 parameter of \d+ \(first model.extra\)"):
        check_exportable(folder, shapes | {"model.extra": (3,)}, "xxh3:0")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    check_exportable(folder, shapes, fingerprint(loaded.items()))
    with pytest.raises(UserError, match="belongs to"):
        check_exportable(folder, shapes, "xxh3:0")


def test_a_run_that_diverges_names_the_checkpoint_before(trained, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "save_steps": 1, "update_rule": "sgd"}
    with pytest.raises(UserError, match=r"NaN or infinite.*there is no checkpoint from before"):
        trained("gpt_neox", learning_rate=1e38, **settings)
    run = tmp_path / "run-gpt_neox"
    assert [one.name for one in (run / "checkpoints").iterdir()] == ["000001"]
