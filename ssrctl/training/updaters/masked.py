"""AdamW on the coordinates of a mask: nothing else moves, and nothing else has state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.mask import BlockMask
from ssrctl.core.masked_adamw import MaskedAdamW
from ssrctl.training.updaters.base import Changes
from ssrctl.training.updaters.dense import DenseGradients


class MaskedAdamWUpdater(DenseGradients):
    """One summed gradient, of which the mask's coordinates are clipped and applied (Adewuyi et al. 2026)."""

    optimizer: MaskedAdamW

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, frozen: BlockMask | None
    ) -> None:
        assert frozen is not None, "a mask leaves something frozen"
        super().__init__(dict(parameters), config.max_grad_norm)
        self.num_protected = frozen.count()
        self.optimizer = MaskedAdamW(
            parameters,
            ~frozen,
            lr=config.resolved_learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            master_weights=config.master_weights,
        )

    def _trained(self, name: str) -> Tensor:
        """Ascending flat indices (int64) of a parameter's masked coordinates, from the optimizer's own compact sets."""
        parameter = self.named[name]
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.empty(0, dtype=torch.int64, device=parameter.device)
        return IndexSet(parameter.numel(), state["low"], state["counts"]).to_indices()

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
                square += float(parameter.grad.view(-1)[self._trained(name)].double().square().sum())
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
        found: Changes = {}
        for name, parameter in self.named.items():
            if (indices := self._trained(name)).numel() and float(self.optimizer.state[parameter]["step"]):
                found[name] = (indices.cpu(), parameter.detach().view(-1)[indices].cpu())
        return found
