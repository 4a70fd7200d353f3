"""Changes to attention weights that preserve a model's function (Zhu et al. 2025, appendix D).

Notation for one layer: H query heads and K key/value heads of D dimensions each, query head h reading key/value head
``h // (H / K)``. Linear layers store ``[out, in]``: head h owns rows ``h D .. (h + 1) D - 1`` of the q, k and v
projections and the same columns of the o projection.

``rotate``: with an orthogonal R_g (D x D) for each key/value head g, V_g becomes R_g^T V_g and O_h becomes O_h R_g for
every query head h of g. Attention averages values, so its output is R_g^T times what it was, which O_h R_g undoes
(proposition D.1, which takes one R for all heads; each head having its own changes nothing in the proof). Beyond the
paper, the queries and keys of g are turned too, by one angle for each pair of dimensions (i, i + D / 2) that the rotary
embedding turns: rotations of a plane commute, and equal ones cancel in every product of a query and a key. Norms of
queries and keys scale each dimension by itself and would not commute; there queries and keys stay as they are, which
is the paper's intervention.

``permute-heads``: key/value heads are permuted, and within each its query heads, with the columns of O to match; no
head stays at its place.

Biases go the way of the rows that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ssrctl.core.kl import kl_both_ways
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError

Kind = Literal["rotate", "permute-heads"]
Edit = Callable[[Tensor], Tensor]

SUPPORTED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_REMEDY = f"give a model whose attention is one of {', '.join(SUPPORTED)}"
_FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "in_proj")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Attention:
    """The facts about one layer's attention that an intervention needs.

    Attributes:
        layer: its number, from 0.
        name: of the module; its parameters' names begin with it.
        num_heads: query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: key/value heads.
        head_dim: dimensions of a head, an even number.
        biased: the projections that have a bias.
        has_qk_norm: True if queries and keys are normalised before the rotary embedding.
    """

    layer: int
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    biased: frozenset[str]
    has_qk_norm: bool

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def rows(self, projection: str) -> list[str]:
        """Return the parameters whose rows are the projection's outputs."""
        parameters = ["weight", "bias"] if projection in self.biased else ["weight"]
        return [f"{self.name}.{projection}.{one}" for one in parameters]


# --------------------------------------------------------------------------------------------------
# which models


def attention_layers(model: Any) -> list[Attention]:
    """Return every layer's attention, in the order of the layers.

    Raises:
        UserError: anything but the attention of Llama, Mistral, Qwen2 or Qwen3 made of ordinary linear layers, by name
            and with the reason: an intervention on a layer that works otherwise would change the function.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    if not found:
        raise UserError(f"{type(model).__name__} has no attention that interventions know", _REMEDY)
    layers = [_attention(name, module) for name, module in found]
    _check_rotary(model, layers[0].head_dim)
    return sorted(layers, key=lambda attention: attention.layer)


def _attention(name: str, module: Any) -> Attention:
    kind = type(module).__name__
    if not type(module).__module__.startswith("transformers.models.") or kind not in SUPPORTED:
        fused = next((child for child, _ in module.named_children() if child in _FUSED), None)
        reason = (
            f"{fused} holds query, key and value in one matrix"
            if fused
            else "whether it has other parts between its projections is not known"
        )
        raise UserError(f"{name} is a {kind}, which interventions do not support: {reason}", _REMEDY)
    for projection in _PROJECTIONS:
        linear = getattr(module, projection)
        if type(linear) is not torch.nn.Linear or not linear.weight.is_floating_point():
            raise UserError(
                f"{name}.{projection} is a {type(linear).__name__}, "
                "not an ordinary linear layer of floating-point weights",
                "give the model before quantisation, or with its adapter merged",
            )
    dim, repeats = module.head_dim, module.num_key_value_groups
    kv_heads = module.k_proj.out_features // dim
    norms = [norm for norm in _NORMS if hasattr(module, norm)]
    expected = {
        "q_proj.weight": (kv_heads * repeats * dim, module.q_proj.in_features),
        "k_proj.weight": (kv_heads * dim, module.q_proj.in_features),
        "v_proj.weight": (kv_heads * dim, module.q_proj.in_features),
        "o_proj.weight": (module.o_proj.out_features, kv_heads * repeats * dim),
    } | {f"{norm}.weight": (dim,) for norm in norms}
    for parameter, tensor in module.named_parameters():
        part, _, leaf = parameter.rpartition(".")
        known = expected.get(parameter) == tuple(tensor.shape) or (leaf == "bias" and part in _PROJECTIONS)
        if not known:
            raise UserError(f"{name}.{parameter} with shape {list(tensor.shape)} is not a known part", _REMEDY)
    biased = frozenset(one for one in _PROJECTIONS if getattr(module, one).bias is not None)
    return Attention(module.layer_idx, name, kv_heads * repeats, kv_heads, dim, biased, bool(norms))


def _check_rotary(model: Any, head_dim: int) -> None:
    """Raise a UserError unless the rotary embedding covers the whole head: only then are its pairs (i, i + D/2)."""
    for name, buffer in model.named_buffers():
        if name.endswith("rotary_emb.inv_freq") and 2 * buffer.numel() != head_dim:
            raise UserError(
                f"{name} turns {2 * buffer.numel()} of the {head_dim} dimensions of a head, which is not supported",
                "give a model whose rotary embedding covers the whole head",
            )


def chosen_layers(attentions: Sequence[Attention], ranges: Iterable[range] | None) -> list[Attention]:
    """Return the layers in ``ranges``, in order; all without.

    Raises:
        UserError: a layer that the model does not have.
    """
    if ranges is None:
        return list(attentions)
    by_layer = {attention.layer: attention for attention in attentions}
    wanted = sorted({layer for one in ranges for layer in one})
    if absent := [layer for layer in wanted if layer not in by_layer]:
        raise UserError(
            f"--layers names layer {absent[0]}, the model has {len(by_layer)} layers",
            f"choose from 0-{max(by_layer)}",
        )
    return [by_layer[layer] for layer in wanted]


# --------------------------------------------------------------------------------------------------
# the edits


def edits(attentions: Iterable[Attention], kind: Kind, seed: int) -> dict[str, Edit]:
    """Return, for each parameter that the intervention changes, a function from the old to the new tensor.

    Args:
        attentions: the layers to change.
        kind: the intervention.
        seed: every layer and key/value head draws from its own, derived from this one.

    Returns:
        By parameter name: a function of the stored tensor, of any floating dtype; rotations compute in float64 and
        return it, permutations return the tensor's own dtype.

    Raises:
        UserError: a layer with a single head, which cannot be permuted.
    """
    make = {"rotate": _rotation_edits, "permute-heads": _permutation_edits}[kind]
    made: dict[str, Edit] = {}
    for attention in attentions:
        made |= make(attention, seed)
    return made


def _rotation_edits(attention: Attention, seed: int) -> dict[str, Edit]:
    dim, repeats = attention.head_dim, attention.heads_per_kv
    seeds = [derive_seed(seed, "intervene", "rotate", attention.layer, head) for head in range(attention.num_kv_heads)]
    values = torch.stack([haar_orthogonal(dim, derive_seed(one, "value")) for one in seeds])
    made: dict[str, Edit] = {name: partial(rotate_rows, rotations=values) for name in attention.rows("v_proj")}
    outputs = values.repeat_interleave(repeats, dim=0)
    made[f"{attention.name}.o_proj.weight"] = partial(rotate_columns, rotations=outputs)
    if not attention.has_qk_norm:
        keys = torch.stack([rotary_rotation(dim, derive_seed(one, "key")) for one in seeds])
        made |= {name: partial(rotate_rows, rotations=keys) for name in attention.rows("k_proj")}
        queries = keys.repeat_interleave(repeats, dim=0)
        made |= {name: partial(rotate_rows, rotations=queries) for name in attention.rows("q_proj")}
    return made


def _permutation_edits(attention: Attention, seed: int) -> dict[str, Edit]:
    kv_order, order = head_orders(
        attention.num_kv_heads,
        attention.heads_per_kv,
        derive_seed(seed, "intervene", "permute-heads", attention.layer),
        attention.name,
    )
    made: dict[str, Edit] = {name: partial(take_rows, order=order) for name in attention.rows("q_proj")}
    for projection in ("k_proj", "v_proj"):
        made |= {name: partial(take_rows, order=kv_order) for name in attention.rows(projection)}
    return made | {f"{attention.name}.o_proj.weight": partial(take_columns, order=order)}


def haar_orthogonal(size: int, seed: int) -> Tensor:
    """Return an orthogonal matrix, float64 ``[size, size]``, drawn from the Haar measure.

    The Q of a Gaussian matrix, with the signs of R's diagonal taken out, without which it would depend on how the
    decomposition chooses signs (Mezzadri 2007, "How to generate random matrices from the classical compact groups").
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    drawn: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return drawn


def rotary_rotation(size: int, seed: int) -> Tensor:
    """Return a rotation, float64 ``[size, size]``, that commutes with rotary embeddings of pairs (i, i + size / 2).

    Each pair turns by its own angle, uniform on the circle.
    """
    half = size // 2
    angles = torch.rand(half, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * (2 * math.pi)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def head_orders(num_kv_heads: int, heads_per_kv: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Return (old key/value head at each new place, old query head at each new place), int64 ``[K]`` and ``[H]``.

    Query heads stay with their key/value head, and no head stays at its place: key/value heads are drawn uniformly
    among the permutations that move each of them, and query heads within each uniformly among all; a single key/value
    head has no other place, and its query heads each move.

    Raises:
        UserError: there is only one head.
    """
    if num_kv_heads * heads_per_kv == 1:
        raise UserError(f"{name} has one head, there is nothing to permute", "use --intervene rotate")
    generator = torch.Generator().manual_seed(seed)
    if num_kv_heads == 1:
        return torch.zeros(1, dtype=torch.int64), _derangement(heads_per_kv, generator)
    kv_order = _derangement(num_kv_heads, generator)
    groups = [head * heads_per_kv + torch.randperm(heads_per_kv, generator=generator) for head in kv_order]
    return kv_order, torch.cat(groups)


def _derangement(size: int, generator: torch.Generator) -> Tensor:
    """Return a permutation of 2 or more that leaves nothing in its place, by rejection: about one draw in e is one."""
    places = torch.arange(size)
    while bool(((order := torch.randperm(size, generator=generator)) == places).any()):
        pass
    return order


def rotate_rows(tensor: Tensor, rotations: Tensor) -> Tensor:
    """Return R_h^T times the rows of every head h, in float64.

    Args:
        tensor: ``[H D, in]``, or a bias ``[H D]``.
        rotations: float64 ``[H, D, D]``.
    """
    num_heads, dim, _ = rotations.shape
    heads = tensor.double().view(num_heads, dim, -1)
    return (rotations.transpose(1, 2) @ heads).view(tensor.shape)


def rotate_columns(tensor: Tensor, rotations: Tensor) -> Tensor:
    """Return the columns ``[out, H D]`` of every head h times R_h (float64 ``[H, D, D]``), in float64."""
    num_heads, dim, _ = rotations.shape
    return torch.einsum("ohi,hij->ohj", tensor.double().view(-1, num_heads, dim), rotations).reshape(tensor.shape)


def take_rows(tensor: Tensor, order: Tensor) -> Tensor:
    """Return the rows of the heads ``order`` (int64 ``[H]``) of ``[H D, in]``, or of a bias ``[H D]``."""
    return tensor.view(len(order), -1)[order].view(tensor.shape)


def take_columns(tensor: Tensor, order: Tensor) -> Tensor:
    """Return the columns of the heads ``order`` (int64 ``[H]``) of ``[out, H D]``."""
    return tensor.view(tensor.shape[0], len(order), -1)[:, order].reshape(tensor.shape)


@torch.no_grad()
def apply_edits(model: Any, made: Mapping[str, Edit]) -> None:
    """Apply the edits to a model's parameters, rounded to their dtype."""
    parameters = dict(model.named_parameters())
    for name, edit in made.items():
        parameters[name].copy_(edit(parameters[name]))


# --------------------------------------------------------------------------------------------------
# is the function the same?


@dataclass(frozen=True)
class LogitDifference:
    """The difference between two models' logits on the same tokens.

    Attributes:
        max_abs: the largest |difference| of a logit.
        max_logit: the largest |logit| of the first model.
        mean_kl: KL(first || second) in nats, mean over positions.
        max_kl: the same, the largest.
        same_top_frac: share of positions at which both prefer the same token.
        num_positions: token positions compared.
    """

    max_abs: float
    max_logit: float
    mean_kl: float
    max_kl: float
    same_top_frac: float
    num_positions: int

    @property
    def relative(self) -> float:
        """``max_abs`` over ``max_logit``; 0 when both are 0."""
        return self.max_abs / self.max_logit if self.max_logit else (math.inf if self.max_abs else 0.0)


@torch.no_grad()
def logits_on(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits ``[T, V]`` of each prompt, int64 ``[T]``, in the model's dtype.

    Raises:
        UserError: NaN or infinite logits.
    """
    found = [model(input_ids=ids.to(model.device).unsqueeze(0), use_cache=False).logits[0] for ids in prompts]
    if not all(bool(logits.isfinite().all()) for logits in found):
        raise UserError(
            f"the model's logits in {model.dtype} are NaN or infinite", "check that its weights are complete"
        )
    return found


def logit_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> LogitDifference:
    """Compare logits ``[T, V]`` prompt by prompt; there must be at least one position."""
    pairs = list(zip(before, after, strict=True))
    # KL is at least 0; rounding can leave -1e-17 where nothing differs.
    kl = torch.cat([kl_both_ways(first, second)[0] for first, second in pairs]).clamp(min=0.0)
    same = torch.cat([first.argmax(-1) == second.argmax(-1) for first, second in pairs])
    return LogitDifference(
        max_abs=max(float((first.double() - second.double()).abs().max()) for first, second in pairs),
        max_logit=max(float(first.double().abs().max()) for first, _ in pairs),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        same_top_frac=float(same.double().mean()),
        num_positions=kl.numel(),
    )
