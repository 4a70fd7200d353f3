"""Settings of `ssrctl recipes`."""

from __future__ import annotations

from dataclasses import dataclass

from ssrctl.configs.building import positional
from ssrctl.configs.common import JsonConfig


@dataclass(kw_only=True)
class RecipesConfig(JsonConfig):
    """List the recipes of `ssrctl train --recipe` and `ssrctl eval --recipe`, or print one.

    Example: ssrctl recipes ssr-kronos
    """

    name: str | None = positional(metavar="NAME", default=None)
    """Recipe to print: the paper's table that it follows, where it differs, commands to run first, and its settings."""
