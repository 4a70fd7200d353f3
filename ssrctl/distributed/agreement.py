"""Facts on which all processes of a job must agree before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ssrctl.distributed.world import World
from ssrctl.errors import UserError

_SHOWN = 60  # characters of a value in the message


def check_agreement(world: World, facts: Mapping[str, Any]) -> None:
    """Compare the facts of all processes with those of process 0.

    Args:
        world: the processes.
        facts: plain values by field name; the first that differs is named.

    Raises:
        UserError: in every process, naming one that differs and the field.
    """
    everyone = world.gather(dict(facts))
    for rank, theirs in enumerate(everyone):
        for field in sorted(everyone[0].keys() | theirs.keys(), key=list(everyone[0] | theirs).index):
            one, other = everyone[0].get(field), theirs.get(field)
            if one != other:
                raise UserError(
                    f"process {rank} differs from process 0 in {field}: {_shown(other)} instead of {_shown(one)}",
                    "start every process with the same command, files and versions",
                )


def digest(texts: Iterable[str]) -> str:
    """Return a hash of the texts in their order, for ``check_agreement``."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return "sha256:" + found.hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
