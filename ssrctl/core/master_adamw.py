"""AdamW on whole half-precision weights whose updates add up in float32 masters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.adamw import CountedAdamW, adamw, next_step
from ssrctl.core.masters import REMAINDER_DTYPES, join_master, split_master
from ssrctl.core.sparse_update import Survival

# Coordinates updated at a time, which bounds the float32 scratch to some tens of megabytes.
CHUNK = 1 << 22


class MasterAdamW(CountedAdamW):
    """``torch.optim.AdamW`` with float32 moments and exact float32 masters of bfloat16 and float16 weights.

    State of a parameter, made at its first gradient: ``exp_avg`` and ``exp_avg_sq`` float32, and the master's
    ``remainder`` (int16 for bfloat16, float32 for float16; see ``core.masters``), each of the parameter's shape. A
    float32 parameter has no remainder and is updated as by torch.

    Args:
        params: parameters or groups of them; groups may set ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        lr: step size.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Survival:
        state = self.state[parameter]
        if not state:
            state.update(_fresh_state(parameter))
        settings = next_step(state, group)
        flat, gradient = parameter.view(-1), gradient.reshape(-1)
        columns = {name: value.view(-1) for name, value in state.items() if name != "step"}
        survival = Survival()
        for start in range(0, flat.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            stored = flat[part].clone()
            before = join_master(stored, columns["remainder"][part]) if "remainder" in columns else stored.float()
            master = before.clone()
            adamw(
                master,
                gradient[part].to(master.dtype),
                columns["exp_avg"][part],
                columns["exp_avg_sq"][part],
                **settings,
            )
            if "remainder" in columns:
                flat[part], columns["remainder"][part] = split_master(master, parameter.dtype)
            else:
                flat[part] = master
            survival += Survival.of(stored, flat[part], before, master)
        return survival


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
    state = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    if parameter.dtype in REMAINDER_DTYPES:
        state["remainder"] = torch.zeros_like(zeros, dtype=REMAINDER_DTYPES[parameter.dtype])
    return state
