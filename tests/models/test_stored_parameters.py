"""The parameters of a checkpoint on disk are those that transformers makes of it: names, dtypes and every bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.fingerprint import RunningFingerprint, fingerprint
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.errors import UserError
from ssrctl.models.stored_parameters import StoredParameters, stored_parameters

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
WEIGHTS = "model.safetensors"


def llama(tied: bool = True) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def reconfigure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def sharded(folder: Path) -> None:
    llama().bfloat16().save_pretrained(folder, max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def untied(folder: Path) -> None:
    llama(tied=False).save_pretrained(folder)


def untied_and_equal(folder: Path) -> None:
    model = llama(tied=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(folder)


def tied_and_stored(folder: Path) -> None:
    llama().save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


def tied_and_stored_apart(folder: Path) -> None:
    llama().save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})


def rounded_on_loading(folder: Path) -> None:
    llama().save_pretrained(folder)
    reconfigure(folder, dtype="bfloat16")


def without_dtype(folder: Path) -> None:
    llama().bfloat16().save_pretrained(folder)
    reconfigure(folder, dtype="absent")


def mixed_without_dtype(folder: Path) -> None:
    llama().save_pretrained(folder)
    reconfigure(folder, dtype=None)
    rewrite(folder, lambda tensors: tensors | {min(tensors): tensors[min(tensors)].bfloat16()})


def gpt2(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(settings).save_pretrained(folder)


def gpt2_of_the_hub(folder: Path) -> None:
    """Names without the model's prefix, and causal masks beside the weights."""
    gpt2(folder)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 20, 20).tril() for layer in range(2)}
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): one for name, one in tensors.items()} | masks)


CHECKPOINTS = [
    sharded, untied, untied_and_equal, tied_and_stored, tied_and_stored_apart, rounded_on_loading, without_dtype,
    mixed_without_dtype, gpt2, gpt2_of_the_hub,
]  # fmt: skip


def digest(stored: StoredParameters) -> str:
    running = RunningFingerprint()
    for name in stored.names:
        running.begin(name, stored.dtype_of(name), stored.shapes[name])
        for piece in stored.pieces(name):
            running.update(piece)
    return running.digest()


def check(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = dict(model.named_parameters())
    with TensorReader(folder) as reader:
        stored = stored_parameters(reader)
        assert stored.names == sorted(expected) and stored.notes == []
        for name, parameter in expected.items():
            assert stored.dtype_of(name) == parameter.dtype and stored.shapes[name] == tuple(parameter.shape)
            assert torch.equal(stored.tensor(name), parameter)
        assert digest(stored) == fingerprint(expected.items())


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_the_parameters_are_those_of_the_loaded_model(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    check(tmp_path)


def test_the_bundled_model() -> None:
    check(tiny_reasoner.path())


@pytest.mark.parametrize("make", [tied_and_stored, gpt2_of_the_hub], ids=lambda make: make.__name__)
def test_without_a_config_everything_but_copies_and_constants_is_taken(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    (tmp_path / "config.json").unlink()
    with TensorReader(tmp_path / WEIGHTS) as reader:
        stored = stored_parameters(reader)
        if make is tied_and_stored:
            left_out = {"lm_head.weight"}
            note = "lm_head.weight is stored as a copy of model.embed_tokens.weight (tied) and was counted once."
        else:
            left_out = {"h.0.attn.bias", "h.1.attn.bias"}
            note = "2 tensors that are not weights (constants, codes) left out."
        assert stored.names == sorted(reader.shapes.keys() - left_out) and stored.notes == [note]
        assert stored.dtype is None


@pytest.mark.parametrize(
    "broken",
    [{"model_type": "unheard_of"}, {"model_type": "absent"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}],
)
def test_a_config_that_is_of_no_use_is_said(tmp_path: Path, broken: dict[str, Any]) -> None:
    untied(tmp_path)
    reconfigure(tmp_path, architectures=None, **broken)
    with TensorReader(tmp_path) as reader:
        stored = stored_parameters(reader)
        assert stored.names == sorted(reader.shapes)
        assert len(stored.notes) == 1 and "taken as stored, as transformers cannot use config.json: " in stored.notes[0]


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "\0"])
def test_a_config_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    untied(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with TensorReader(tmp_path) as reader:
        assert stored_parameters(reader).names == sorted(reader.shapes)
        assert "cannot use config.json: " in stored_parameters(reader).notes[0]


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    untied(tmp_path)
    reconfigure(tmp_path, intermediate_size=25)
    with TensorReader(tmp_path) as reader, pytest.raises(UserError) as caught:
        stored_parameters(reader)
    assert "6 of the model's 21 parameters are not stored as it has them" in caught.value.message
    assert "down_proj.weight: [16, 25] in the model, [16, 24] in the file" in caught.value.message


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    save_file({"codes": torch.arange(3)}, tmp_path / "codes.safetensors")
    with TensorReader(tmp_path / "codes.safetensors") as reader, pytest.raises(UserError, match="no floating-point"):
        stored_parameters(reader)
