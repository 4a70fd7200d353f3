"""Attention of a chunk whose query heads share keys and values."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

FLASH_DTYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def grouped_attention() -> Iterator[None]:
    """Let ``sdpa`` attention with a mask read shared keys and values in place, and use one copy of the mask.

    transformers repeats keys and values for each query head, and torch turns a bool mask into numbers in each layer. A graph
    keeps both: after a long past, more than the rest of a chunk's activations.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _Grouped(plain)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain:  # somebody's own, which the name had before
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


class _Grouped:
    """An attention function that folds the query heads of one key head into its queries.

    Args:
        plain: transformers' own for ``sdpa``.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.causal: dict[int, tuple[Tensor, bool]] = {}

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> Any:
        """Attend.

        Args:
            module: the attention layer.
            query: ``[r, heads, w, width]``.
            key, value: ``[r, key heads, n, width]``.
            attention_mask: bool or float ``[1 or r, 1 or heads, 1 or w, n]``; None takes ``plain``.
            settings: of ``plain``.

        Returns:
            The output ``[r, w, heads, width]``, and None.
        """
        if attention_mask is None or settings.get("position_bias") is not None:
            return self.plain(module, query, key, value, attention_mask, **settings)
        flash = query.is_cuda and query.dtype in FLASH_DTYPES and settings.get("softcap") is None
        if flash and self._is_causal(attention_mask):
            return self._without_mask(query, key, value, settings), None
        rows, heads, queries, width = query.shape
        key_heads = key.shape[1]
        each = heads // key_heads
        mask = self._folded(attention_mask, query, each)
        query = query.reshape(rows, key_heads, each * queries, width)
        ungrouped = types.SimpleNamespace(is_causal=getattr(module, "is_causal", True))
        out, weights = self.plain(ungrouped, query, key, value, mask, **settings)
        split = out.view(rows, each, queries, key_heads, -1).permute(0, 2, 3, 1, 4)
        return split.reshape(rows, queries, heads, -1), weights

    def _is_causal(self, mask: Tensor) -> bool:
        """Return whether the mask hides from each query what follows it and nothing else, the last query being the last key."""
        if id(mask) not in self.causal:
            queries, keys = mask.shape[2:]
            past = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
            self.causal[id(mask)] = mask, mask.dtype == torch.bool and bool((mask == past).all())
        return self.causal[id(mask)][1]

    def _without_mask(self, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        """Attend with the flash kernel, which reads shared keys in place and takes no mask."""
        from torch.nn.attention.bias import causal_lower_right

        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
            dropout_p=settings.get("dropout", 0.0),
            scale=settings.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous()

    def _folded(self, mask: Tensor, query: Tensor, each: int) -> Tensor:
        """Return the mask of the folded queries as numbers, the same tensor for the same mask."""
        key = (id(mask), each)
        if key not in self.masks:
            made = mask
            if mask.dtype == torch.bool:
                made = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
            made = made.expand(-1, -1, query.shape[2], -1)
            if made.shape[1] == 1:
                made = made.repeat(1, 1, each, 1)
            else:
                made = made.reshape(len(made), query.shape[1] // each, each * query.shape[2], -1)
            self.masks[key] = mask, made  # with the mask, whose id would serve another one otherwise
        return self.masks[key][1]
