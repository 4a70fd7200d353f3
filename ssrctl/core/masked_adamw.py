"""AdamW on a static mask: only these coordinates are trained, and only they have state.

The subnetworks of Mukherjee et al. 2025 and the random masks of Adewuyi et al. 2026 (whose table 5 counts the
state) are trained this way. Outside the mask every bit of the weights stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.adamw import CountedAdamW, adamw, next_step
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.mask import BlockMask
from ssrctl.core.masters import REMAINDER_DTYPES, join_master, split_master
from ssrctl.core.sparse_update import Survival


class MaskedAdamW(CountedAdamW):
    """``torch.optim.AdamW`` for the coordinates of a mask; weight decay, too, applies to them only.

    State of a parameter with ``k`` coordinates in the mask, in 10 bytes per coordinate: ``exp_avg`` and
    ``exp_avg_sq`` float32 ``[k]``, and the mask itself as an index set (``low`` int16 ``[k]`` and ``counts``).
    For a bfloat16 weight, ``remainder`` int16 ``[k]`` makes the weight an exact float32 master, so that no update
    is swallowed (for float16, float32 ``[k]``); see ``core.masters``. Moments are float32 for half-precision
    weights. Parameters without a coordinate in the mask have no state. Gradients are dense and stay the caller's:
    ``clip_grad_norm_`` sees all of them, in the mask or not.

    Args:
        params: (name, parameter) pairs, as from ``model.named_parameters()``, or groups of such; a tied
            parameter once. Groups may set ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        mask: True = trained; names and shapes must be those of ``params``.
        lr: step size.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
        master_weights: keep the exact float32 value of bfloat16 and float16 coordinates.

    ``step`` raises a RuntimeError for a sparse gradient.

    Raises:
        ValueError: an empty mask, a mask over other tensors, parameters without names or with equal ones, that
            are not floating point or not contiguous, or a setting out of range.
    """

    _closed = True  # of copies and unpickled optimizers, which skip the constructor

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        mask: BlockMask,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        master_weights: bool = True,
    ) -> None:
        self._closed = False
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._closed = True
        named = dict(self._in_order())
        _check_mask(mask, named)
        for name, parameter in named.items():
            if mask.tensors[name].tile_ids.numel():
                trained = IndexSet.from_tiles(mask.tensors[name])
                self.state[parameter] = _fresh_state(parameter, trained, masters=master_weights)

    @property
    def num_trained(self) -> int:
        """Coordinates in the mask."""
        return sum(state["low"].numel() for state in self.state.values())

    @property
    def num_bytes(self) -> int:
        """Memory of all state."""
        return sum(value.numel() * value.element_size() for state in self.state.values() for value in state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which must be one of the same mask.

        Raises:
            ValueError: the state of another mask, or of weights with another kind of master.
        """
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        named = self._in_order()
        if len(ids) == len(named):  # torch says what is wrong otherwise
            for key, (name, parameter) in zip(ids, named, strict=True):
                _check_state(name, self.state.get(parameter, {}), state_dict["state"].get(key, {}))
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group for the constructor only: the mask is over the parameters given at the start.

        Raises:
            ValueError: a later group, no names, a name that is taken, or a setting out of range.
        """
        if self._closed:
            raise ValueError("MaskedAdamW takes all its parameters at the start: its mask is over these")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_settings(group)
        if group["params"] and "param_names" not in group:
            raise ValueError("MaskedAdamW needs (name, parameter) pairs, as from model.named_parameters()")
        names = [name for name, _ in self._in_order()]
        if len(set(names)) < len(names):
            raise ValueError(f"two parameters have the same name: {max(names, key=names.count)}")
        for name, parameter in self._in_order():
            if not parameter.is_floating_point() or not parameter.is_contiguous():
                raise ValueError(f"{name} ({parameter.dtype}) is not a contiguous floating-point tensor")

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Survival:
        if parameter not in self.state:
            return Survival()
        state = self.state[parameter]
        if gradient.is_sparse:
            raise RuntimeError("MaskedAdamW takes dense gradients, not sparse ones")
        indices = IndexSet(parameter.numel(), state["low"], state["counts"]).to_indices()
        flat = parameter.view(-1)
        moments = state["exp_avg"], state["exp_avg_sq"]
        stored = flat[indices]
        before = join_master(stored, state["remainder"]) if "remainder" in state else stored.to(moments[0].dtype)
        weights = before.clone()
        adamw(weights, gradient.reshape(-1)[indices].to(weights.dtype), *moments, **next_step(state, group))
        if "remainder" in state:
            written, state["remainder"] = split_master(weights, parameter.dtype)
        else:
            written = weights.to(parameter.dtype)
        flat[indices] = written
        return Survival.of(stored, written, before, weights)

    def _in_order(self) -> list[tuple[str, Tensor]]:
        """All (name, parameter) pairs, group after group."""
        return [
            pair
            for group in self.param_groups
            for pair in zip(group.get("param_names", ()), group["params"], strict=True)
        ]


def _fresh_state(parameter: Tensor, trained: IndexSet, *, masters: bool) -> dict[str, Tensor]:
    trained = trained.to(parameter.device)
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(trained.count, dtype=dtype, device=parameter.device)
    state = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state |= {"low": trained.low, "counts": trained.counts}
    if masters and parameter.dtype in REMAINDER_DTYPES:
        state["remainder"] = torch.zeros_like(zeros, dtype=REMAINDER_DTYPES[parameter.dtype])
    return state


def _check_mask(mask: BlockMask, named: Mapping[str, Tensor]) -> None:
    for name in sorted(named.keys() | mask.shapes.keys()):
        theirs = mask.shapes.get(name)
        ours = tuple(named[name].shape) if name in named else None
        if theirs != ours:
            words = ["absent" if shape is None else str(shape) for shape in (theirs, ours)]
            raise ValueError(
                f"the mask is over other tensors; first difference: {name} is {words[0]} in the mask, "
                f"{words[1]} among the parameters"
            )
    if mask.count() == 0:
        raise ValueError(
            f"the mask selects 0 of {mask.numel} coordinates in {len(named)} tensors: there is nothing to train"
        )


def _check_settings(group: Mapping[str, Any]) -> None:
    if not 0 <= group["lr"] < math.inf:
        raise ValueError(f"the learning rate must be at least 0, got {group['lr']}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    for setting in ("eps", "weight_decay"):
        if not 0 <= group[setting] < math.inf:
            raise ValueError(f"{setting} must be at least 0, got {group[setting]}")


def _check_state(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Refuse a state that is not one of these coordinates; ``step`` and the values are free."""
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"{name}: the state to load and the optimizer differ in {', '.join(odd)}: another mask or dtype"
        )
    for field, value in ours.items():
        if (value.shape, value.dtype) != (theirs[field].shape, theirs[field].dtype):
            raise ValueError(
                f"{name}: {field} is {theirs[field].dtype} {list(theirs[field].shape)} in the state to load, "
                f"{value.dtype} {list(value.shape)} here: another mask or dtype"
            )
    for field in ("low", "counts"):
        if field in ours and not torch.equal(ours[field], theirs[field].to(ours[field].device)):
            raise ValueError(f"{name}: the state to load was made with another mask")
