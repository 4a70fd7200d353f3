"""AdamW on the coordinates of a mask: nothing else moves, and nothing else has state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.masked_adamw import MaskedAdamW
from ssrctl.models.updaters.base import Changes
from ssrctl.models.updaters.dense import DenseGradients


class MaskedAdamWUpdater(DenseGradients):
    """One summed gradient, of which the mask's coordinates are clipped and applied (Adewuyi et al. 2026)."""

    optimizer: MaskedAdamW

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, frozen: BlockMask | None
    ) -> None:
        assert frozen is not None, "a mask leaves something frozen"
        super().__init__(dict(parameters), config.max_grad_norm)
        self.num_protected = frozen.count()
        trained = ~frozen
        self.optimizer = MaskedAdamW(
            parameters,
            trained,
            lr=config.resolved_learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            master_weights=config.master_weights,
        )
        self._trained = {n: tiles.to_indices().to(self.named[n].device) for n, tiles in trained.tensors.items()}

    @staticmethod
    def bytes_per_parameter(config: TrainConfig, itemsize: int) -> float:
        """Memory beside the weights: two gradients; state is small, as the mask is."""
        return 2.0 * itemsize

    @torch.no_grad()
    def step(self) -> dict[str, float | None]:
        square = 0.0
        for name, parameter in self.named.items():
            parameter.grad = self.sum.pop(name, None)
            if parameter.grad is not None:
                square += float(parameter.grad.view(-1)[self._trained[name]].double().square().sum())
        norm = square**0.5
        scale = self.clip_scale(norm)
        for parameter in self.named.values():
            if parameter.grad is not None and scale < 1.0:
                parameter.grad.mul_(scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(parameter.numel() for parameter in self.named.values())
        updated = total - self.num_protected if norm > 0 else 0
        return {"grad_norm": norm, "clip_scale": scale, "updated_frac": updated / total}

    def changes(self) -> Changes:
        return {
            name: (indices.cpu(), self.named[name].detach().view(-1)[indices].cpu())
            for name, indices in self._trained.items()
            if indices.numel() and float(self.optimizer.state[self.named[name]]["step"])
        }
