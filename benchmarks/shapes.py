"""Random models of well-known shapes, for benchmarks that do not need a trained model."""

from __future__ import annotations

import torch


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
