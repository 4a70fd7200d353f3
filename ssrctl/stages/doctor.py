"""`ssrctl doctor`: checks of an installation, with the versions and devices to paste into a bug report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssrctl.configs import DoctorConfig
from ssrctl.errors import CheckFailed, first_line
from ssrctl.io import manifest
from ssrctl.io.visible import visible
from ssrctl.sampling.engines.vllm_plugin import BACKEND

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

# Packages of optional features, besides those that every manifest names.
OPTIONAL = (
    "math-verify",
    "matplotlib",
    "jinja2",
    "triton",
    "trl",
    "numpy",
    "scipy",
    "pydantic",
    "typer",
    "rich",
    "huggingface-hub",
    "vllm",
)
USES = {
    "critic": "--critic llm",
    "math": "answers in LaTeX",
    "gguf": "GGUF files in `diagnose`",
    "report": "pictures of budget profiles",
    "lora": "`train --lora-r`",
    "integrations": "TRL, PEFT and the Triton kernel",
}
GIB = 2**30
SMALL_MEMORY = (
    4  # GiB: loading torch and transformers takes one, a model of 0.5B parameters in bfloat16 and its gradient two
)
SMALL_DISK = 10  # GiB: a model of 1.7B parameters in bfloat16 is 3.4, and a run keeps several checkpoints
FEW_FILES = 1024  # a checkpoint of 160 shards and its base are open together, beside what torch needs
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        name: its subject.
        state: ``warn`` is for a feature that will not work or a shortage, ``fail`` for what every command needs.
        text: what was found.
        remedy: what to do about it; None if it is ok.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str
    remedy: str | None = None


def run(config: DoctorConfig) -> dict[str, Any]:
    """Print versions, devices and checks on stdout (unless ``--json``) and return them.

    They include no path, user or host, and of environment variables only the names of those that say "offline".

    Raises:
        CheckFailed: a check failed.
    """
    found = versions_and_devices()
    checks = list(all_checks())
    result = found | {"checks": [dataclasses.asdict(check) for check in checks]}
    if not config.json:
        _show(found, checks)
    failed = [check for check in checks if check.state == "fail"]
    if failed:
        names = ", ".join(check.name for check in failed)
        raise CheckFailed(names, failed[0].remedy, result)
    return result


def versions_and_devices() -> dict[str, Any]:
    """Return what a bug report needs."""
    import psutil
    import torch

    found: dict[str, Any] = dict(manifest.versions())
    found |= {package: _version(package) for package in OPTIONAL}
    return found | {
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "cuda": torch.version.cuda,
        "devices": [
            f"{torch.cuda.get_device_name(place)}, {torch.cuda.get_device_properties(place).total_memory / GIB:.0f} GiB"
            for place in range(torch.cuda.device_count())
        ],
    }


def all_checks() -> Iterator[Check]:
    """Yield the outcome of every check."""
    try:
        yield from check_requirements(importlib.metadata.distribution("ssrctl").metadata)
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "packages", "warn", "ssrctl runs from its source, uninstalled: its needs are not known", "pip install -e ."
        )
    yield from _check_devices()
    yield _check_memory()
    yield from _check_folders()
    yield _check_open_files()
    yield from _check_hub()
    yield from _check_vllm()


def check_requirements(metadata: Any) -> Iterator[Check]:
    """Check the versions of Python and of packages against the ranges of the installed package's metadata.

    Args:
        metadata: of the package; ``Requires-Python`` and ``Requires-Dist`` are read.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = platform.python_version(), metadata["Requires-Python"]
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Check(
        "python", "ok" if fits else "fail", f"{python} ({wanted})", None if fits else f"install Python {wanted}"
    )
    needed, extras = list[Requirement](), dict[str, list[Requirement]]()
    for text in metadata.get_all("Requires-Dist") or []:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            needed.append(one)
            continue
        for extra in USES:
            if one.marker.evaluate({"extra": extra}):
                extras.setdefault(extra, []).append(one)
    odd = [said for one in needed if (said := _misfit(one)) is not None]
    yield Check(
        "packages",
        "fail" if odd else "ok",
        "; ".join(odd) or f"{len(needed)} in their ranges",
        "pip install --upgrade ssrctl, in the environment of this Python" if odd else None,
    )
    for extra, requirements in extras.items():
        odd = [said for one in requirements if (said := _misfit(one)) is not None]
        text = f"{'; '.join(odd)}: needed for {USES[extra]}" if odd else f"for {USES[extra]}"
        yield Check(f"extra {extra}", "warn" if odd else "ok", text, f"pip install 'ssrctl[{extra}]'" if odd else None)


def _misfit(wanted: Requirement) -> str | None:
    """Return what is wrong with the installed version of a package; None if it is in the range."""
    found = _version(wanted.name)
    if found is None:
        return f"{wanted.name} is not installed"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is outside of {wanted.specifier}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_devices() -> Iterator[Check]:
    """Multiply small matrices on each device, and in bfloat16."""
    import torch

    for device in [torch.device("cpu"), *(torch.device("cuda", place) for place in range(torch.cuda.device_count()))]:
        yield _check_device(device)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
        yield Check(
            "cuda",
            "warn",
            f"there is an NVIDIA driver, and torch {torch.__version__} cannot use it",
            "install torch's CUDA build for this driver: https://pytorch.org/get-started/locally",
        )
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "not used: sums are in float64, which it lacks; commands run on the CPU")


def _check_device(device: torch.device) -> Check:
    import torch

    try:
        ones = torch.ones(64, 64, device=device)
        right = all(
            float((ones.to(dtype) @ ones.to(dtype)).sum()) == 64.0**3 for dtype in (torch.float32, torch.bfloat16)
        )
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return Check(
            str(device),
            "fail",
            f"cannot multiply matrices: {first_line(error)}",
            "reinstall torch, or give --device cpu",
        )
    if not right:
        return Check(
            str(device), "fail", "a product of matrices of ones is wrong", "reinstall torch, or check the device"
        )
    if device.type == "cpu":
        return Check("cpu", "ok", "float32 by default; bfloat16 works with --dtype bfloat16")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(str(device), "ok", "computes in bfloat16")
    return Check(
        str(device), "warn", "no bfloat16 of its own", "commands compute in float32 there, in twice the memory"
    )


def _check_memory() -> Check:
    import psutil

    free = psutil.virtual_memory().available / GIB
    if free >= SMALL_MEMORY:
        return Check("memory", "ok", f"{free:.1f} GiB free")
    return Check(
        "memory",
        "warn",
        f"{free:.1f} GiB free, of which 0.5B parameters in bfloat16 and their gradient take {SMALL_MEMORY}",
        "close other programs; `--dry-run` says what a run takes",
    )


def _check_folders() -> Iterator[Check]:
    """Check that outputs and downloads can be written, and that there is room for them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, elsewhere in (
        ("current folder", Path.cwd(), "change to a folder of your own, or give -o"),
        ("hub cache", Path(HF_HUB_CACHE), "set HF_HOME to a folder you can write to"),
    ):
        place = next(one for one in (folder, *folder.parents) if one.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            yield Check(name, "fail", "cannot be written to", elsewhere)
            continue
        free = shutil.disk_usage(place).free / GIB
        if free >= SMALL_DISK:
            yield Check(name, "ok", f"can be written to, {free:,.0f} GiB free")
        else:
            yield Check(name, "warn", f"{free:.1f} GiB free", f"make room, or {elsewhere}")


def _check_open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")
    wanted = FEW_FILES if hard == resource.RLIM_INFINITY else min(FEW_FILES, hard)
    return Check(
        "open files", "warn", f"at most {soft:,}, too few for checkpoints of many shards", f"ulimit -n {wanted}"
    )


def _check_hub() -> Iterator[Check]:
    from huggingface_hub import get_token

    if offline := [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]:
        yield Check("hub", "warn", f"offline by {', '.join(offline)}: only the cache is used", f"unset {offline[0]}")
    else:
        yield Check("hub", "ok", "downloads are allowed")
    if get_token() is not None:
        yield Check("hub token", "ok", "present")
    else:
        yield Check("hub token", "warn", "none: gated models and `ssrctl push` need one", "hf auth login")


def _check_vllm() -> Iterator[Check]:
    """Check that a vLLM of this environment sees the plugin; it usually has an environment of its own."""
    if _version("vllm") is None:
        yield Check("vllm", "ok", "not in this environment; `ssrctl serve-rollouts --python` checks its own")
        return
    seen = any(point.name == BACKEND for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    allowed = os.environ.get("VLLM_PLUGINS")
    if not seen:
        yield Check("vllm", "warn", "it does not see the plugin", "pip install --no-deps ssrctl")
    elif allowed is not None and BACKEND not in allowed.split(","):
        yield Check("vllm", "warn", "VLLM_PLUGINS leaves the plugin out", f"add {BACKEND} to VLLM_PLUGINS")
    else:
        yield Check("vllm", "ok", "it sees the plugin")


def _show(found: dict[str, Any], checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ssrctl.io.terminal import SafeConsole

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in found.items():
        text = ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        table.add_row(key.replace("_", " "), Text(text or "none"))
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(table)
    console.print()
    width = max(len(check.name) for check in checks)
    for check in checks:
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
        said = f"  {check.name:{width}}  {visible(check.text)}"
        console.print(Text.assemble((f"{check.state:4}", style), said))
        if check.remedy is not None:
            console.print(Text.assemble(" " * (width + 8), ("fix: ", "bold"), check.remedy))
