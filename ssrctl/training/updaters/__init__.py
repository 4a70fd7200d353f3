"""Updaters turn the per-unit gradients of a question into an update: KronosOpt, or AdamW in the same loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.world import ALONE, World
from ssrctl.training.updaters.adamw import AdamWUpdater
from ssrctl.training.updaters.base import QuestionUpdate, Updater, frozen_coordinates
from ssrctl.training.updaters.kronos import KronosUpdater
from ssrctl.training.updaters.masked import MaskedAdamWUpdater
from ssrctl.training.updaters.sharded import ShardedUpdater

__all__ = ["QuestionUpdate", "Updater", "frozen_coordinates", "make_updater", "updater_kind"]


def updater_kind(config: TrainConfig) -> type[KronosUpdater] | type[AdamWUpdater] | type[MaskedAdamWUpdater]:
    """Return the class of the updater that the settings ask for."""
    if config.optimizer == "kronos":
        return KronosUpdater
    return AdamWUpdater if config.mask is None else MaskedAdamWUpdater


def make_updater(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    config: TrainConfig,
    protected: BlockMask | None = None,
    mask: BlockMask | None = None,
    world: World = ALONE,
    sharded: ShardedModel | None = None,
) -> Updater:
    """Create the updater of a run.

    Args:
        parameters: (name, parameter) of every trainable tensor.
        config: the run's settings.
        protected: coordinates that never change.
        mask: the only coordinates that may change; None allows all.
        world: the processes that share a batch.
        sharded: the model of ``parameters``, where each process has a shard of it; it is the shards that are updated then.
    """
    if sharded is not None:
        frozen, trained = sharded.mask_rows(protected), sharded.mask_rows(mask)
        inner = updater_kind(config)(sharded.parameters, config, frozen, trained, process_group=sharded.group)
        return ShardedUpdater(inner, sharded)
    return updater_kind(config)(parameters, config, protected, mask, world)
