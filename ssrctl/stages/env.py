"""`ssrctl env`: the versions and devices to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from ssrctl.configs import EnvConfig
from ssrctl.io import manifest

# Packages of optional features, besides those that every manifest names.
OPTIONAL = (
    "math-verify",
    "matplotlib",
    "jinja2",
    "triton",
    "trl",
    "peft",
    "numpy",
    "scipy",
    "pydantic",
    "typer",
    "rich",
)


def run(config: EnvConfig) -> dict[str, Any]:
    """Collect versions and devices, print them on stdout (unless ``--json``) and return them.

    They include no path, user, host or value of an environment variable.
    """
    import psutil
    import torch

    found: dict[str, Any] = dict(manifest.versions())
    for package in OPTIONAL:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found |= {
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": torch.version.cuda,
        "devices": [
            f"{torch.cuda.get_device_name(place)}, {torch.cuda.get_device_properties(place).total_memory / 2**30:.0f} GiB"
            for place in range(torch.cuda.device_count())
        ],
    }
    if not config.json:
        _show(found)
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ssrctl.io.terminal import SafeConsole

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in found.items():
        text = ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        table.add_row(key.replace("_", " "), Text(text or "none"))
    SafeConsole(highlight=False, soft_wrap=True).print(table)
