"""Random models of well-known shapes, for benchmarks that do not need a trained model."""

from __future__ import annotations

from typing import Any

import torch

from ssrctl.core.units import Unit
from ssrctl.training.unit_gradients import GroupBatch, make_batch


def llama_135m(dtype: torch.dtype, *, vocab_size: int = 49152, tied: bool = True) -> torch.nn.Module:
    """Build a Llama of SmolLM2-135M's shapes: 134.5M random weights, 106M of them outside the tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(shape).to(dtype)


def qwen3_1_7b(dtype: torch.dtype) -> torch.nn.Module:
    """Build a model of Qwen3-1.7B's sizes with random weights: 1.72B, the embedding tied."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in float32 the weights would take twice the memory while they are made
    try:
        return Qwen3ForCausalLM(shape)
    finally:
        torch.set_default_dtype(default)


def random_question(
    model: Any, *, responses: int, prompt: int, tokens: int, units: int, logprob: float, seed: int
) -> tuple[GroupBatch, list[Unit]]:
    """Make a question of random tokens: equal lengths in equal steps, one unit each, and normal advantages.

    Args:
        model: its vocabulary and device count.
        responses, prompt, tokens, units: number of responses, tokens of the prompt and of each response, steps.
        logprob: the log-probability at the sampling of every token.
        seed: of tokens and advantages.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (responses, prompt + tokens), generator=generator).tolist()
    advantages = torch.randn(units, responses, generator=generator, dtype=torch.float64).tolist()
    batch = make_batch(
        ids[0][:prompt],
        [row[prompt:] for row in ids],
        [torch.full((tokens,), logprob)] * responses,
        [[place * units // tokens for place in range(tokens)]] * responses,
        pad_token_id=0,
        device=model.device,
    )
    return batch, [Unit((step,), min(0.01, 0.05 / units), (tuple(advantages[step]),)) for step in range(units)]
