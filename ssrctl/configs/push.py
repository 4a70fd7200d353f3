"""Settings of uploads to the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssrctl.configs.building import positional
from ssrctl.configs.common import CommonConfig


@dataclass(kw_only=True)
class PushConfig(CommonConfig):
    """Upload a delta, a mask, a budget profile or an applied folder to the Hugging Face hub, with a model card.

    The card names the base, its fingerprint, the settings and the command to apply it. Every command then takes OWNER/NAME
    (or OWNER/NAME@REVISION) where it takes such a file.

    Example: ssrctl push runs/first me/my-delta --private
    """

    path: Path = positional(metavar="PATH")
    """A delta, mask or budget profile, a run directory or checkpoint folder (its delta), or a model folder that `ssrctl
    delta apply` wrote."""

    repo: str = positional(metavar="REPO")
    """Repository on the hub, OWNER/NAME; made if it does not exist."""

    private: bool = False
    """Make a new repository private."""
