"""The inputs that the recorded commands start from: small checkpoints with known changes, and a few texts.

Everything here is drawn from one seed with torch alone, so that nothing of the package under test has a say in it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Weights = dict[str, torch.Tensor]

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, HEAD, VOCABULARY = 2, 64, 96, 4, 2, 16, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
# Steps in the style of a language model, with what is hard to cut: decimals, formulas, a list, code, a blank line.
PROSE = [
    "First, add 3.5 and 4.5. That gives 8. Then multiply by 2, e.g. 8*2=16. So the answer is 16.",
    "1. Let $x = 3$.\n2. Then $x^2 = 9$ and\n   $$x^3 = 27.$$\n3. Hence the sum is 39.\n\n**Answer:** 39",
    "We are given 12 apples.\n\nTom eats 5 of them. However, Dr. Lee adds 2.\n\n```python\nleft = 12 - 5\nleft += 2\n```\n\n#### 9",
    "The number is 7",
]
# Chains of the bundled task (numbers modulo 100) with the index of their first wrong step, -1 where none is wrong.
LABELLED = [
    ("12+5*3=?", ["12+5=17", "17*3=51\n####51"], -1, True),
    ("40-6+9=?", ["40-6=34", "34+9=44\n####44"], 1, False),
    ("25*4+7=?", ["25*4=00", "00+7=07\n####07"], -1, True),
    ("81+3-8=?", ["81+3=85", "85-8=77\n####77"], 0, False),
    ("33-7*2=?", ["33-7=26", "26*3=78\n####78"], 1, False),
]


def base_weights() -> Weights:
    """Draw the base: every matrix and norm of a Llama of two layers, in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    made = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in MATRICES.items():
            made[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{norm}.weight"] = 1 + draw(HIDDEN)
    return made | {"model.norm.weight": 1 + draw(HIDDEN)}


def tuned_weights(base: Weights) -> dict[str, Weights]:
    """Change the base in three ways.

    - ``tuned1``: 1% of a matrix of layer 0 moves far, 2% of another by less than any tolerance.
    - ``tuned2``: every matrix of layer 1 gets an update of rank 2.
    - ``tuned3``: 5% of a matrix of layer 0 becomes 0, and a norm doubles; the rest is as in ``tuned1``.
    """
    generator = torch.Generator().manual_seed(1)

    def places(tensor: torch.Tensor, share: float) -> torch.Tensor:
        return torch.randperm(tensor.numel(), generator=generator)[: round(share * tensor.numel())]

    first = {name: tensor.clone() for name, tensor in base.items()}
    far, near = first["model.layers.0.self_attn.q_proj.weight"], first["model.layers.0.mlp.up_proj.weight"]
    far.view(-1)[places(far, 0.01)] += 0.05
    near.view(-1)[places(near, 0.02)] *= 1 + 1e-6
    second = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in second.items():
        if ".layers.1." in name and tensor.dim() == 2:
            left = torch.randn(tensor.shape[0], 2, generator=generator)
            tensor += 0.002 * left @ torch.randn(2, tensor.shape[1], generator=generator)
    third = {name: tensor.clone() for name, tensor in first.items()}
    zeroed = third["model.layers.0.mlp.down_proj.weight"]
    zeroed.view(-1)[places(zeroed, 0.05)] = 0
    third["model.norm.weight"] *= 2
    return {"tuned1": first, "tuned2": second, "tuned3": third}


def plant(where: Path) -> None:
    """Write ``base``, ``tuned1`` to ``tuned3``, the same ending in ``-bf16``, and the texts into ``where``."""
    base = base_weights()
    for name, weights in {"base": base, **tuned_weights(base)}.items():
        _model(where / name, weights, torch.float32)
        _model(where / f"{name}-bf16", weights, torch.bfloat16)
    prose = [{"id": f"p/{index}", "question": "?", "response": text} for index, text in enumerate(PROSE)]
    _lines(where / "prose.jsonl", prose)
    keys = ("problem", "steps", "label", "final_answer_correct")
    chains = [dict(zip(keys, chain, strict=True)) | {"modulus": 100} for chain in LABELLED]
    _lines(where / "labelled.jsonl", [{"id": f"c{index}"} | chain for index, chain in enumerate(chains)])


def _model(folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write an ordinary model folder with a tokenizer of single characters."""
    folder.mkdir(parents=True)
    converted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    settings = CONFIG | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    letters = [chr(code) for code in range(32, 32 + VOCABULARY - 4)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
