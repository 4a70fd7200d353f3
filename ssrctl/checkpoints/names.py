"""Tensor names: the layer and the kind of matrix that a name stands for."""

from __future__ import annotations

import re

KINDS = ("embed", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm", "lm_head", "other")

# The first pattern that is found in the name decides, whatever its case; norms come first because of q_norm
# and k_norm.
_KIND_PATTERNS = (
    ("norm", r"norm|(^|[._])ln(_\w+|\d*)?\."),
    ("lm_head", r"(^|\.)(lm_head|embed_out|output_layer)\.|^(model\.)?output\.weight$"),
    ("embed", r"embed|(^|\.)(wte|wpe)\."),
    ("qkv", r"\.(qkv_proj|query_key_value|c_attn|wqkv|qkv)\."),
    ("gate_up", r"\.gate_up_proj(\.|$)"),
    ("q", r"\.(q_proj|wq|query|q_lin)\."),
    ("k", r"\.(k_proj|wk|key|k_lin)\."),
    ("v", r"\.(v_proj|wv|value|v_lin)\."),
    ("o", r"\.(o_proj|wo|out_proj|out_lin|attn\.c_proj|(self_)?(attention|attn)\.dense|attention\.output\.dense)\."),
    ("down", r"\.(down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|output\.dense)(\.|$)"),
    ("gate", r"\.(gate_proj|w1)(\.|$)"),
    ("up", r"\.(up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h)(\.|$)"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


def matrix_kind(name: str) -> str:
    """Return the part of a transformer that a tensor is, by its name: one of ``KINDS``. A bias counts with its matrix."""
    for kind, pattern in _KIND_PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def layer_index(name: str) -> int | None:
    """Return the layer number in a tensor's name, from 0; None outside of the layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None
