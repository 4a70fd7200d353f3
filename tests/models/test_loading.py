"""Loading a model folder: nothing is made up, and whatever is wrong with the folder is said in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from ssrctl.configs import ModelConfig
from ssrctl.errors import UserError
from ssrctl.models.loading import LoadedModel, load_model

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path, bpe_tokenizer) -> Path:
    path = tmp_path / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(path)
    bpe_tokenizer.save_pretrained(path)
    return path


def load(folder: Path, dtype: Any = "float32") -> LoadedModel:
    return load_model(ModelConfig(model=str(folder), dtype=dtype, device="cpu"))


def refusal(folder: Path, dtype: Any = "float32") -> str:
    with pytest.raises(UserError) as caught:
        load(folder, dtype)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def reconfigure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# --------------------------------------------------------------------------------------------------
# nothing is made up


def test_a_whole_folder_loads_bit_for_bit(folder: Path) -> None:
    loaded = load(folder)
    stored = load_file(folder / WEIGHTS)
    assert stored.keys() == dict(loaded.model.named_parameters()).keys()
    assert all(torch.equal(parameter, stored[name]) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "actor.", "base_model.model."])
def test_weights_with_a_wrappers_prefix_are_refused_by_its_name(folder: Path, prefix: str) -> None:
    rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    message = refusal(folder)
    assert "lacks 21 of the model's 21 tensors (first lm_head.weight" in message
    assert f"all its names begin with '{prefix}'" in message


def test_weights_that_the_file_lacks_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: without(tensors, "model.layers.1.mlp.down_proj.weight", "lm_head.weight"))
    assert "lacks 2 of the model's 21 tensors (first lm_head.weight, model.layers.1.mlp.down_proj" in refusal(folder)


def test_a_reward_model_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: without(tensors, "lm_head.weight") | {"score.weight": torch.ones(1, 16)})
    assert "it is a classifier or reward model" in refusal(folder)


def test_a_value_head_is_left_out_and_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 16)})
    load(folder)
    assert "1 tensor of" in (said := capfd.readouterr().err.replace("\n", " ")) and "v_head.summary.weight" in said


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"], ids=["layer", "bias"]
)
def test_a_tensor_that_the_model_would_drop_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(16)})
    assert f"no place for (first {name})" in refusal(folder)


def test_old_constants_are_no_reason_to_refuse(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load(folder)
    assert "not used" not in capfd.readouterr().err


def test_other_shapes_are_refused_with_both(folder: Path) -> None:
    reconfigure(folder, intermediate_size=20)
    message = refusal(folder)
    assert "6 tensors of 21 have another shape" in message and "[16, 24] in the file, [16, 20] by the config" in message


def test_a_tied_head_of_other_values_is_used_and_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reconfigure(folder, tie_word_embeddings=True)
    loaded = load(folder)
    assert "the config ties the output head" in capfd.readouterr().err.replace("\n", " ")
    assert torch.equal(loaded.model.lm_head.weight, load_file(folder / WEIGHTS)["lm_head.weight"])
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    load(folder)
    assert "ties the output head" not in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------
# one line instead of a traceback


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = value
        return tensors

    rewrite(folder, change)
    message = refusal(folder)
    assert "2 in 1 tensor, first 2 of 384 in model.layers.1.mlp.up_proj.weight" in message


def test_weights_beyond_float16_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.norm.weight": torch.full((16,), 1e6)})
    assert "float32 or bfloat16" in refusal(folder, "float16")
    load(folder, "bfloat16")


def test_a_pad_token_beyond_the_embedding_is_named(folder: Path, bpe_tokenizer) -> None:
    import copy

    tokenizer = copy.deepcopy(bpe_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id >= len(bpe_tokenizer)
    reconfigure(folder, vocab_size=len(bpe_tokenizer))
    rewrite(folder, lambda old: {n: t[: len(bpe_tokenizer)].clone() if len(t) == 300 else t for n, t in old.items()})
    load(folder)
    tokenizer.save_pretrained(folder)
    assert f"has id {tokenizer.pad_token_id}, the embedding has rows 0 to" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pad_token_id": 400}, "pad_token_id 400 in config.json is beyond its vocab_size 300"),
        ({"dtype": "bf16"}, "bf16"),
        ({"dtype": 7}, "asks for dtype 7"),
        ({"model_type": "brandnew9"}, "upgrade transformers"),
        ({"model_type": "\ud800"}, "model type"),
        ({"num_hidden_layers": 10**30}, "asks for 1e+30 layers"),
        ({"hidden_size": 10**40}, "cannot be loaded"),
        ({"hidden_size": "many"}, "cannot be loaded"),
        ({"hidden_size": -16}, "cannot be loaded"),
        ({"auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "y.Y"}, "model_type": "mine"}, "--trust-remote-code"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "needs a package"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "needs a package"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_mean(folder: Path, settings: dict[str, Any], expected: str) -> None:
    reconfigure(folder, **settings)
    assert expected in refusal(folder).encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 50_000, '{"vocab_size": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert folder.name in refusal(folder)


def test_an_encoder_decoder_is_refused(tmp_path: Path, bpe_tokenizer) -> None:
    config = T5Config(vocab_size=300, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    bpe_tokenizer.save_pretrained(tmp_path)
    assert "is an encoder-decoder (t5)" in refusal(tmp_path)


def test_pointers_of_git_lfs_are_named(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    assert "is a git-lfs pointer" in refusal(folder)


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


# --------------------------------------------------------------------------------------------------
# one rule for what is read


def test_pickles_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    load(folder)
    (folder / WEIGHTS).unlink()
    assert "pickles may run code" in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "elsewhere"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert f"{name} is a link that leads out of the model's folder" in refusal(folder)


def test_a_shard_outside_of_the_folder_is_refused(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder.parent / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lies outside of the model's folder" in refusal(folder)


def test_the_hubs_cache_is_read_through_its_own_links(folder: Path) -> None:
    cache = folder.parent / "models--me--tiny"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, one in enumerate(sorted(folder.iterdir())):
        one.rename(blobs / str(number))
        (snapshot / one.name).symlink_to(f"../../blobs/{number}")
    load(snapshot)


# --------------------------------------------------------------------------------------------------
# fuzzing


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_folder_loads_or_is_refused(folder: Path, seed: int) -> None:
    """No file of a folder may lead to another error than a ``UserError``, however it is damaged."""
    rng = random.Random(seed)
    originals = {one: one.read_bytes() for one in sorted(folder.iterdir())}
    for _ in range(5):
        file = rng.choice([one for one in originals if one.name != "generation_config.json"])
        file.write_bytes(damaged(originals[file], rng))
        try:
            loaded = load(folder)
        except UserError as error:
            assert "\n" not in error.message
        else:
            assert all(bool(torch.isfinite(parameter).all()) for parameter in loaded.model.parameters())
        file.write_bytes(originals[file])


def damaged(content: bytes, rng: random.Random) -> bytes:
    made = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(made[: rng.randrange(len(made))])
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            made[rng.randrange(min(len(made), 4000))] = rng.randrange(256)
    elif kind == 2:
        at, length = rng.randrange(len(made)), rng.randrange(1, 200)
        del made[at : at + length]
    elif kind == 3:
        digits = [place for place, byte in enumerate(made[:4000]) if chr(byte).isdigit()]
        for place in rng.sample(digits, min(3, len(digits))):
            made[place] = ord(rng.choice("0123456789"))
    else:
        words = [b'"x"', b"null", b"[]", b"-1", b"1e400", b"true", b'"\\ud800"']
        places = [place for place, byte in enumerate(made[:4000]) if byte == ord(":")]
        if places:
            at = rng.choice(places) + 1
            made[at:at] = b" " + rng.choice(words) + b","
    return bytes(made)
