"""Dense AdamW in the same loop: the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.counting import Group
from ssrctl.core.mask import BlockMask
from ssrctl.core.master_adamw import MasterAdamW
from ssrctl.core.masters import REMAINDER_DTYPES
from ssrctl.distributed.world import ALONE, World
from ssrctl.training.updaters.base import Changes
from ssrctl.training.updaters.dense import DenseGradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdamWUpdater(DenseGradients):
    """Dense AdamW on the sum of all units' gradients (SSR eq. 14); protected coordinates are restored after each step.

    Copies of the base weights are kept of the protected coordinates only. Half-precision weights have float32 masters,
    unless ``--no-master-weights``.
    """

    optimizer: MasterAdamW | torch.optim.AdamW

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        config: TrainConfig,
        protected: BlockMask | None = None,
        mask: BlockMask | None = None,
        world: World = ALONE,
        process_group: ProcessGroup | None = None,
    ) -> None:
        assert mask is None, "MaskedAdamWUpdater trains a mask"
        super().__init__(dict(parameters), config.max_grad_norm, world, Group(process_group))
        kind = MasterAdamW if _has_masters(config, self.named) else torch.optim.AdamW
        self.optimizer = kind(
            self.named.values(),
            lr=config.resolved_learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.num_protected = self._over_all(protected.count() if protected is not None else 0)
        self._protected: dict[str, tuple[Tensor, Tensor]] = {}
        for name, indices in (protected.to_indices() if protected is not None else {}).items():
            flat = self.named[name].detach().view(-1)
            indices = indices.to(flat.device)
            self._protected[name] = indices, flat[indices]

    @staticmethod
    def bytes_per_parameter(config: TrainConfig, itemsize: int) -> float:
        """Return the memory besides the weights: a gradient and ``held_bytes``."""
        return itemsize + AdamWUpdater.held_bytes(config, itemsize)

    @staticmethod
    def held_bytes(config: TrainConfig, itemsize: int, trained_frac: float = 1.0) -> float:
        """Return the bytes per parameter that stay during a backward pass: moments, masters, the sum of gradients."""
        moments = 8.0 + 2.0 if config.master_weights and itemsize == 2 else 2.0 * itemsize
        return moments + (itemsize if config.questions_per_step > 1 else 0)

    def pending(self) -> None:
        """Return None: every weight may change."""

    @torch.no_grad()
    def step(self) -> dict[str, float | None]:
        if not self.sum:
            self.optimizer.step()  # changes nothing without gradients; schedules count it
            return {"grad_norm": 0.0, "clip_scale": 1.0, "updated_frac": 0.0}
        for name, parameter in self.named.items():
            parameter.grad = self.sum.pop(name, None)
            if parameter.grad is not None and name in self._protected:
                parameter.grad.view(-1)[self._protected[name][0]] = 0.0
        norm = self._clipped_norm()
        self.check_finite(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, (indices, values) in self._protected.items():
            self.named[name].view(-1)[indices] = values  # weight decay changes them without a gradient
            if "remainder" in (state := self.optimizer.state.get(self.named[name], {})):
                state["remainder"].view(-1)[indices] = 0
        metrics: dict[str, float | None] = {
            "grad_norm": norm,
            "clip_scale": self.clip_scale(norm),
            "updated_frac": (self.num_coordinates - self.num_protected) / self.num_coordinates,
        }
        if isinstance(self.optimizer, MasterAdamW):
            metrics["lost_update_frac"] = self.optimizer.survival.over(self.group).lost_frac
        return metrics

    def _clipped_norm(self) -> float:
        """Clip the gradients by their norm over all processes of the group; return the norm before."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
        if self.group.group is not None:
            norm = self.group.total(norm.double().square().cpu()).sqrt().to(norm)
        torch.nn.utils.clip_grads_with_norm_(self.named.values(), self.max_grad_norm or float("inf"), norm)
        return float(norm)

    def changes(self) -> Changes:
        trained = [name for name, parameter in self.named.items() if parameter in self.optimizer.state]
        return DenseChanges(trained, lambda name: self.named[name], self._protected)


def _has_masters(config: TrainConfig, named: Mapping[str, Tensor]) -> bool:
    return config.master_weights and any(parameter.dtype in REMAINDER_DTYPES for parameter in named.values())


class DenseChanges(Mapping[str, tuple[Tensor, Tensor]]):
    """All unprotected coordinates, read one tensor at a time: their indices take 8 bytes each.

    Args:
        names: of the tensors.
        read: returns the tensor of a name.
        protected: by name, flat indices that are left out, and their values.
    """

    def __init__(
        self, names: Sequence[str], read: Callable[[str], Tensor], protected: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        self._names, self._read, self._protected = names, read, protected

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        values = self._read(name).detach().view(-1).cpu()
        free = torch.ones(values.numel(), dtype=torch.bool)
        if name in self._protected:
            free[self._protected[name][0].cpu()] = False
        indices = free.nonzero().flatten()
        return indices, values[indices]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
