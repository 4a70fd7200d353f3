"""`ssrctl diagnose MODEL --intervene` from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from ssrctl import tiny_reasoner
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.models import interventions
from ssrctl.stages.diagnose.intervene import REPORT, TOLERANCE, run_intervene

TINY = Path("tiny-reasoner")
PREFIX = "model.layers.1.self_attn."


def intervene(
    model: Path, output: Path, kind: Literal["rotate", "permute-heads"] = "rotate", **more: Any
) -> dict[str, Any]:
    return run_intervene(DiagnoseConfig(paths=[model], intervene=kind, output_dir=output, **more))


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed_names(before: Path, after: Path) -> set[str]:
    old, new = all_weights(before), all_weights(after)
    assert {name: (one.dtype, one.shape) for name, one in old.items()} == {
        name: (one.dtype, one.shape) for name, one in new.items()
    }
    return {name for name, one in old.items() if not torch.equal(one.view(torch.uint8), new[name].view(torch.uint8))}


@pytest.fixture
def qwen2(tmp_path: Path, bpe_tokenizer: Any) -> Path:
    """A random Qwen2 in bfloat16, in several shards, its norms in float32, with tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    model.to(torch.bfloat16)
    model.model.norm.float()
    folder = tmp_path / "qwen2"
    model.save_pretrained(folder, max_shard_size="10KB")
    bpe_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["rotate", "permute-heads"])
def test_a_sharded_bfloat16_model_keeps_its_layout_and_all_other_weights(
    qwen2: Path, tmp_path: Path, kind: Literal["rotate", "permute-heads"], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = intervene(qwen2, out, kind, layers="1", seed=2)
    assert changed_names(qwen2, out) == {
        PREFIX + name
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias",
                     "o_proj.weight")
    }  # fmt: skip
    assert len(list(out.glob("*.safetensors"))) > 2
    assert {one.name for one in out.iterdir()} == {one.name for one in qwen2.iterdir()} | {REPORT}
    assert (out / "config.json").read_text() == (qwen2 / "config.json").read_text()
    assert json.loads((out / REPORT).read_text()) == json.loads(json.dumps(report))
    assert (report["kind"], report["layers"], report["seed"], report["dtype"]) == (kind, [1], 2, "bfloat16")
    assert report["float32"]["relative"] < 1e-5
    assert report["stored"]["relative"] < 0.2 and report["stored"]["num_positions"] > 32
    assert report["dtype_alone"]["max_abs"] > 0
    assert report["notes"] == []
    err = capfd.readouterr().err
    assert f"maximum logit difference in float32: {report['float32']['max_abs']:.3g}" in err
    assert f"the same in bfloat16, as written: {report['stored']['max_abs']:.3g}" in err


def test_the_written_model_is_the_base_to_anyone_who_loads_it(qwen2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = intervene(qwen2, tmp_path / "out")
    ids = torch.arange(5, 30).unsqueeze(0)
    logits = []
    for folder in (qwen2, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    # Rounded to bfloat16 (8 bits) in three layers; a wrong rotation is off by as much as the logits.
    assert float((logits[0] - logits[1]).abs().max()) < 0.05 * float(logits[0].abs().max())
    assert report["layers"] == [0, 1, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("12+30")["input_ids"]


def test_norms_of_queries_and_keys_leave_v_and_o_to_rotate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = intervene(TINY, tmp_path / "out", layers="0")
    names = {f"model.layers.0.self_attn.{name}.weight" for name in ("v_proj", "o_proj")}
    assert changed_names(tiny_reasoner.path(), tmp_path / "out") == names == set(report["changed_tensors"])
    assert "q and k of layers 0 stay as they are: their q_norm and k_norm" in capfd.readouterr().err
    assert report["float32"]["relative"] < 1e-5


def test_a_wrong_rotation_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = interventions.rotate_columns
    monkeypatch.setattr(interventions, "rotate_columns", lambda t, rotations: right(t, rotations.transpose(1, 2)))
    with pytest.raises(UserError, match=f"the function would change: .*{TOLERANCE:g} is allowed.*nothing was written"):
        intervene(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_end_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("ssrctl.stages.diagnose.intervene._written_difference", stop)
    with pytest.raises(KeyboardInterrupt):
        intervene(TINY, tmp_path / "out")
    assert calls and list(tmp_path.iterdir()) == []


def test_the_plan_is_shown_and_nothing_written(tmp_path: Path) -> None:
    plan = intervene(TINY, tmp_path / "out", layers="1", dry_run=True)
    assert plan["layers"] == [1] and len(plan["changed_tensors"]) == 2
    assert plan["model"]["name"] == "tiny-reasoner"
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        intervene(TINY, tmp_path / name, seed=seed)
    assert changed_names(tmp_path / "a", tmp_path / "b") == set()
    assert len(changed_names(tmp_path / "a", tmp_path / "c")) == 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [("0-2", "layer 2, the model has 2 layers"), ("x", "must list layers"), ("1-0", "runs backwards")],
)
def test_layers_that_are_not_there_are_refused(layers: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        intervene(TINY, tmp_path / "out", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        intervene(TINY, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tiny_reasoner.path() / "model.safetensors"):
        with pytest.raises(UserError, match="is not a model folder"):
            intervene(path, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter"):
        intervene(tmp_path / "adapter", tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(qwen2: Path, tmp_path: Path) -> None:
    config = json.loads((qwen2 / "tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    config["model"]["vocab"] = {token: (900 + index if index > 5 else index) for token, index in vocabulary.items()}
    (qwen2 / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the model has 300 embeddings"):
        intervene(qwen2, tmp_path / "out")
