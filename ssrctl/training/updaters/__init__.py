"""What turns a question's per-unit gradients into an update: KronosOpt, or AdamW in the same loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.training.updaters.adamw import AdamWUpdater
from ssrctl.training.updaters.base import QuestionUpdate, Updater
from ssrctl.training.updaters.kronos import KronosUpdater
from ssrctl.training.updaters.masked import MaskedAdamWUpdater

__all__ = ["QuestionUpdate", "Updater", "frozen_coordinates", "make_updater", "updater_kind"]


def updater_kind(config: TrainConfig) -> type[KronosUpdater] | type[AdamWUpdater] | type[MaskedAdamWUpdater]:
    """The updater that the settings ask for."""
    if config.optimizer == "kronos":
        return KronosUpdater
    return AdamWUpdater if config.mask is None else MaskedAdamWUpdater


def make_updater(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    config: TrainConfig,
    protected: BlockMask | None = None,
    mask: BlockMask | None = None,
) -> Updater:
    """The updater of a run.

    Args:
        parameters: (name, parameter) of every trainable tensor.
        config: the run's settings.
        protected: coordinates that never change.
        mask: the only coordinates that may change; None allows all.
    """
    return updater_kind(config)(parameters, config, frozen_coordinates(protected, mask))


def frozen_coordinates(protected: BlockMask | None, mask: BlockMask | None) -> BlockMask | None:
    """What never changes: the protected coordinates, and with a mask all that is not in it."""
    if mask is None:
        return protected
    return ~mask if protected is None else ~mask | protected
