"""How sparse is the update between two checkpoints?

Update sparsity (Mukherjee et al. 2025, arXiv:2505.11711): the share of weights with ``|tuned - base| <=
atol`` for one fixed tolerance, 1e-5 there. Beside it the share that is equal bit for bit, since the fixed
tolerance also hides real changes of small weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Elements compared at once: 8 MiB as float64, so that the temporaries stay near the caches.
_CHUNK = 1 << 20

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
    """Which part of a transformer a tensor is, by its name: one of ``KINDS``. A bias counts with its matrix."""
    for kind, pattern in _KIND_PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def layer_index(name: str) -> int | None:
    """The layer number in a tensor's name, from 0; None outside of the layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True, kw_only=True)
class Change:
    """Counts and sums over compared weights; two of them add up.

    Attributes:
        numel: weights compared.
        num_within: with ``|difference| <= atol``, or equal bit for bit (as NaN to the same NaN is).
        num_equal: equal bit for bit in the dtype of the comparison; 0 and -0 differ.
        num_finite: with a finite difference; the sums and the maximum below are over these.
        sum_abs: sum of ``|difference|``, float64.
        max_abs: largest ``|difference|``, 0 when there is none.
        sum_sq: sum of squared differences, float64.
        base_sum_sq: sum of squares of the base's finite weights, float64.
        num_nan_base, num_inf_base, num_nan_tuned, num_inf_tuned: how many weights are NaN or infinite.
    """

    numel: int = 0
    num_within: int = 0
    num_equal: int = 0
    num_finite: int = 0
    sum_abs: float = 0.0
    max_abs: float = 0.0
    sum_sq: float = 0.0
    base_sum_sq: float = 0.0
    num_nan_base: int = 0
    num_inf_base: int = 0
    num_nan_tuned: int = 0
    num_inf_tuned: int = 0

    def __add__(self, other: Change) -> Change:
        total = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        total["max_abs"] = max(self.max_abs, other.max_abs)
        return Change(**total)

    @property
    def sparsity(self) -> float | None:
        """Share unchanged within the tolerance, in [0, 1]; None when nothing was compared."""
        return self.num_within / self.numel if self.numel else None

    @property
    def equal_frac(self) -> float | None:
        """Share equal bit for bit, in [0, 1]; None when nothing was compared."""
        return self.num_equal / self.numel if self.numel else None

    @property
    def mean_abs(self) -> float | None:
        """Mean ``|difference|`` over the finite differences, changed or not."""
        return self.sum_abs / self.num_finite if self.num_finite else None

    @property
    def relative_l2(self) -> float | None:
        """``||tuned - base|| / ||base||``; 0 without any change, None when only the base is zero."""
        if self.sum_sq == 0:
            return 0.0
        return math.sqrt(self.sum_sq / self.base_sum_sq) if self.base_sum_sq else None

    def numbers(self) -> dict[str, float | int | None]:
        """What the report shows: counts as stored, shares and norms derived."""
        return {
            "numel": self.numel,
            "sparsity": self.sparsity,
            "bit_equal_frac": self.equal_frac,
            "num_changed": self.numel - self.num_within,
            "num_bit_changed": self.numel - self.num_equal,
            "relative_l2": self.relative_l2,
            "mean_abs_difference": self.mean_abs,
            "max_abs_difference": self.max_abs if self.num_finite else None,
            "num_nan_base": self.num_nan_base,
            "num_inf_base": self.num_inf_base,
            "num_nan_tuned": self.num_nan_tuned,
            "num_inf_tuned": self.num_inf_tuned,
        }


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest floating dtype that holds the values of both exactly; 8-bit floats meet in float32.

    Integers follow ``torch.promote_types``, which can round large ones that meet floats.
    """
    import torch

    if a == b:
        return a
    wide = [torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype for dtype in (a, b)]
    return torch.promote_types(*wide)


def compare_tensors(base: Tensor, tuned: Tensor, atol: float) -> Change:
    """Compare two tensors of one shape, of any real dtypes, in the wider of the two.

    Works through slices of fixed size in float64, so memory-mapped tensors are never held whole.

    Raises:
        ValueError: different shapes, or complex tensors.
    """
    if base.shape != tuned.shape:
        raise ValueError(f"shapes differ: {list(base.shape)} and {list(tuned.shape)}")
    if base.is_complex() or tuned.is_complex():
        raise ValueError("complex tensors are not compared")
    dtype = common_dtype(base.dtype, tuned.dtype)
    total = Change()
    for a, b in zip(base.flatten().split(_CHUNK), tuned.flatten().split(_CHUNK), strict=True):
        total += _compare_slice(a.to(dtype), b.to(dtype), atol)
    return total


def _compare_slice(base: Tensor, tuned: Tensor, atol: float) -> Change:
    import torch

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    equal = base.contiguous().view(integer) == tuned.contiguous().view(integer)
    num_equal = int(equal.sum())
    same = num_equal == base.numel()
    a = base.to(torch.float64)
    b = a if same else tuned.to(torch.float64)
    base_sum_sq = float(a.dot(a))
    if math.isfinite(base_sum_sq) and (same or math.isfinite(float(b.dot(b)))):
        # Every weight of both is finite, so nothing has to be left out: several times as fast.
        return _finite_slice(a, b, num_equal, base_sum_sq, atol)
    # Equal infinities have a difference of NaN; bit-equal weights have one of 0 whatever they are.
    difference = (b - a).masked_fill_(equal, 0.0).abs_()
    finite = difference.isfinite()
    kept = difference[finite]
    return Change(
        numel=base.numel(),
        num_within=int((equal | (difference <= atol)).sum()),
        num_equal=num_equal,
        num_finite=int(finite.sum()),
        sum_abs=float(kept.sum()),
        max_abs=float(kept.max()) if kept.numel() else 0.0,
        sum_sq=float(kept.square().sum()),
        base_sum_sq=float(a[a.isfinite()].square().sum()),
        num_nan_base=int(a.isnan().sum()),
        num_inf_base=int(a.isinf().sum()),
        num_nan_tuned=int(b.isnan().sum()),
        num_inf_tuned=int(b.isinf().sum()),
    )


def _finite_slice(base: Tensor, tuned: Tensor, num_equal: int, base_sum_sq: float, atol: float) -> Change:
    """The same for float64 ``[n]`` without NaN or infinity, ``num_equal`` of which are equal bit for bit."""
    numel = base.numel()
    if num_equal == numel:
        return Change(numel=numel, num_within=numel, num_equal=numel, num_finite=numel, base_sum_sq=base_sum_sq)
    difference = (tuned - base).abs_()
    return Change(
        numel=numel,
        num_within=int((difference <= atol).sum()),
        num_equal=num_equal,
        num_finite=numel,
        sum_abs=float(difference.sum()),
        max_abs=float(difference.max()),
        sum_sq=float(difference.dot(difference)),
        base_sum_sq=base_sum_sq,
    )


def add_up(changes: Iterable[Change]) -> Change:
    """The sum; of nothing, an empty ``Change``."""
    return sum(changes, Change())


def group_changes(changes: Mapping[str, Change]) -> tuple[dict[int | None, Change], dict[str, Change]]:
    """(by layer, by kind), each in order; layer None holds what is outside of the layers and comes last."""
    layers: dict[int | None, Change] = {}
    kinds: dict[str, Change] = {}
    for name, change in changes.items():
        layer, kind = layer_index(name), matrix_kind(name)
        layers[layer] = layers.get(layer, Change()) + change
        kinds[kind] = kinds.get(kind, Change()) + change
    by_layer = dict(sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)))
    return by_layer, {kind: kinds[kind] for kind in KINDS if kind in kinds}
