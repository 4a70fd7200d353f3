"""Settings of `ssrctl env`."""

from __future__ import annotations

from dataclasses import dataclass

from ssrctl.configs.common import JsonConfig


@dataclass(kw_only=True)
class EnvConfig(JsonConfig):
    """Print versions and devices, to paste into a bug report.

    Example: ssrctl env
    """
