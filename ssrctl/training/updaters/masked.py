"""AdamW on the coordinates of a mask: nothing else changes, and nothing else has optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.mask import BlockMask
from ssrctl.core.masked_adamw import MaskedAdamW
from ssrctl.distributed.world import ALONE, World
from ssrctl.training.updaters.base import Changes, values_at
from ssrctl.training.updaters.dense import DenseGradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MaskedAdamWUpdater(DenseGradients):
    """AdamW on the unprotected coordinates of a mask; the clip sees only their gradient (Adewuyi et al. 2026)."""

    optimizer: MaskedAdamW

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        config: TrainConfig,
        protected: BlockMask | None = None,
        mask: BlockMask | None = None,
        world: World = ALONE,
        process_group: ProcessGroup | None = None,
    ) -> None:
        assert mask is not None, "AdamWUpdater trains everything"
        assert process_group is None, "the configuration refuses it"
        super().__init__(dict(parameters), config.max_grad_norm, world)
        self.optimizer = MaskedAdamW(
            parameters,
            mask if protected is None else mask - protected,
            lr=config.resolved_learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            master_weights=config.master_weights,
        )
        self.num_protected = self.num_coordinates - self.optimizer.num_trained

    def _trained(self, name: str) -> Tensor:
        """Return the ascending flat indices (int64) of a parameter's trained coordinates."""
        parameter = self.named[name]
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.empty(0, dtype=torch.int64, device=parameter.device)
        return IndexSet(parameter.numel(), state["low"], state["counts"]).to_indices()

    @staticmethod
    def bytes_per_parameter(config: TrainConfig, itemsize: int) -> float:
        """Return the memory besides the weights: two gradients; state is small, as the mask is."""
        return 2.0 * itemsize

    @staticmethod
    def held_bytes(config: TrainConfig, itemsize: int, trained_frac: float = 1.0) -> float:
        """Return the bytes per parameter that stay during a backward pass: the sum of gradients, the mask's state."""
        state = 10 + (2 if config.master_weights and itemsize == 2 else 0)
        return trained_frac * state + (itemsize if config.questions_per_step > 1 else 0)

    def pending(self) -> dict[str, Tensor]:
        return {name: self._trained(name) for name in self.sum}

    @torch.no_grad()
    def step(self) -> dict[str, float | None]:
        square = 0.0
        for name, parameter in self.named.items():
            parameter.grad = self.sum.pop(name, None)
            if parameter.grad is not None:
                square += float(parameter.grad.view(-1)[self._trained(name)].double().square().sum())
        norm = square**0.5
        self.check_finite(norm)
        scale = self.clip_scale(norm)
        for parameter in self.named.values():
            if parameter.grad is not None and scale < 1.0:
                parameter.grad.mul_(scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        updated = self.optimizer.num_trained if norm > 0 else 0
        return {
            "grad_norm": norm,
            "clip_scale": scale,
            "updated_frac": updated / self.num_coordinates,
            "lost_update_frac": self.optimizer.survival.lost_frac,
        }

    def changes(self) -> Changes:
        stepped = {n: p for n, p in self.named.items() if p in self.optimizer.state and self.optimizer.state[p]["step"]}
        return values_at(stepped, {name: self._trained(name) for name in stepped})
