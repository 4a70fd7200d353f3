"""The agreement of all processes on settings, versions, weights and questions, before they sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ssrctl.configs import Config
from ssrctl.distributed.agreement import check_agreement, digest
from ssrctl.distributed.world import World
from ssrctl.io import manifest
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.groups import Prompted

# Settings of a process that do not bear on what it computes.
FREE = ("output_dir", "output", "num_processes", "accelerate_config", "json")


def agree(
    world: World, config: Config, loaded: LoadedModel, prompts: Sequence[Prompted], more: Mapping[str, Any]
) -> None:
    """Raise a UserError in every process if one differs from process 0; it names the process and the field.

    Args:
        world: the processes; one alone agrees.
        config: the settings.
        loaded: the model.
        prompts: the questions, in order.
        more: further plain values by name.
    """
    if world.size == 1:
        return
    settings = {key: value for key, value in manifest.settings_of(config).items() if key not in FREE}
    check_agreement(
        world,
        {
            **settings,
            **{f"version of {name}": found for name, found in manifest.versions().items()},
            **more,
            "device type": loaded.device.type,
            "number of threads": torch.get_num_threads(),
            "weights": loaded.identity.fingerprint,
            "precision of the weights": str(loaded.model.dtype),
            "questions": digest(f"{one.problem.id} {one.problem.answer} {one.prompt_ids}" for one in prompts),
        },
    )
