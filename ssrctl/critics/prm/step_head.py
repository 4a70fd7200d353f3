"""Qwen2.5-Math-PRM: a Qwen2 decoder with a head of two linear layers over every token (Zhang et al. 2025).

The published folders bring python code for it, which is not run; its tensors are ``model.*``, ``score.0.weight``,
``score.0.bias``, ``score.2.weight`` and ``score.2.bias``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class StepHeadModel(Qwen2PreTrainedModel):
    """Qwen2 with the head ``Linear(h, h)``, ReLU, ``Linear(h, labels)``."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()

    @classmethod
    def from_config(cls, config: Any, **settings: Any) -> StepHeadModel:
        """Return the model with random weights, as the classes of AutoModel do."""
        return cls(config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> TokenClassifierOutput:
        """Return ``logits``, ``[B, T, labels]``.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 = a token that is there.
            use_cache: keep keys and values.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        return TokenClassifierOutput(logits=self.score(hidden.last_hidden_state))
