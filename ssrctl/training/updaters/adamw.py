"""Dense AdamW in the same loop: the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssrctl.checkpoints.delta import changed_indices
from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.training.updaters.base import Changes
from ssrctl.training.updaters.dense import DenseGradients


class AdamWUpdater(DenseGradients):
    """Dense AdamW on the sum of all units' gradients (SSR eq. 14); protected coordinates are put back."""

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, frozen: BlockMask | None
    ) -> None:
        super().__init__(dict(parameters), config.max_grad_norm)
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=config.resolved_learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.base = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.named.items()}
        self.num_protected = frozen.count() if frozen is not None else 0
        self._frozen = frozen.to_indices() if frozen is not None else {}

    @staticmethod
    def bytes_per_parameter(config: TrainConfig, itemsize: int) -> float:
        """Memory beside the weights: two gradients, two moments, and the base weights to find what changed."""
        return 5.0 * itemsize

    @torch.no_grad()
    def step(self) -> dict[str, float | None]:
        if not self.sum:
            self.optimizer.step()  # moves nothing without gradients; schedules count it
            return {"grad_norm": 0.0, "clip_scale": 1.0, "updated_frac": 0.0}
        for name, parameter in self.named.items():
            parameter.grad = self.sum.pop(name, None)
            if parameter.grad is not None and name in self._frozen:
                parameter.grad.view(-1)[self._frozen[name]] = 0.0
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm or float("inf")))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, indices in self._frozen.items():
            # Weight decay moves what has no gradient, so the originals are written back.
            self.named[name].view(-1)[indices] = self.base[name].view(-1)[indices].to(self.named[name].device)
        total = sum(parameter.numel() for parameter in self.named.values())
        return {
            "grad_norm": norm,
            "clip_scale": self.clip_scale(norm),
            "updated_frac": (total - self.num_protected) / total,
        }

    def changes(self) -> Changes:
        found: Changes = {}
        for name, parameter in self.named.items():
            now = parameter.detach().cpu()
            indices = changed_indices(self.base[name], now)
            if indices.numel():
                found[name] = (indices, now.view(-1)[indices])
        return found
