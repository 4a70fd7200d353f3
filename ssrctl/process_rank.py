"""The place of this process in a job of several, as launchers (torchrun, accelerate launch) say it in the environment."""

from __future__ import annotations

import os

MARK = "SSRCTL_LAUNCHED"  # in the environment of the processes that --num-processes starts


def rank() -> int:
    """Return the number of this process in its job; 0 without a launcher."""
    return _number("RANK", 0)


def num_launched() -> int:
    """Return the number of processes in the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process among those on this machine."""
    return _number("LOCAL_RANK", rank())


def is_launched() -> bool:
    """Return True if a launcher started this process as one of several."""
    return num_launched() > 1


def comes_from_launcher() -> bool:
    """Return True if a launcher started this process, also as the only one."""
    return "WORLD_SIZE" in os.environ or MARK in os.environ


def is_ours() -> bool:
    """Return True if ``--num-processes`` started this process."""
    return MARK in os.environ


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
