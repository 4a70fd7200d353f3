"""Settings that name code of users: ``module:name`` to import, or the entry point of an installed package."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
from collections.abc import Collection
from dataclasses import field
from typing import Any

from ssrctl.errors import UserError

CRITICS, REWARDS = "ssrctl.critics", "ssrctl.rewards"  # groups of entry points
_METADATA = {"names_code": True}


def names_code(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """Make a field whose value may be ``module:name``, which is imported.

    Such a value is taken from the command line only: the yaml file of a run or of someone else must not decide which code
    is run.
    """
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=_METADATA)
    return field(default=default, metadata=_METADATA)


def is_imported(name: str) -> bool:
    """Return True for ``module:name``, False for the name of a built-in part or of an entry point."""
    return ":" in name


def imported_names(config: Any) -> dict[str, list[str]]:
    """Return the values ``module:name`` of a config by field; fields without one are left out."""
    found = {}
    for spec in dataclasses.fields(config):
        if spec.metadata.get("names_code"):
            value = getattr(config, spec.name)
            found[spec.name] = [name for name in ([value] if isinstance(value, str) else value) if is_imported(name)]
    return {name: values for name, values in found.items() if values}


def entry_point(group: str, name: str) -> importlib.metadata.EntryPoint | None:
    """Return the entry point of a group; None if no installed package has it."""
    return next(iter(importlib.metadata.entry_points(group=group, name=name)), None)


def check_name(shown: str, name: str, group: str, built_in: Collection[str] = ()) -> None:
    """Check the value of a setting made by ``names_code``; nothing is imported.

    Args:
        shown: the flag, for errors.
        name: the value.
        group: entry points that it may name.
        built_in: other names that are known.

    Raises:
        UserError: neither built in, nor ``module:name``, nor an entry point.
    """
    if name in built_in or entry_point(group, name) is not None:
        return
    module, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        return
    known = [*built_in, *sorted({point.name for point in importlib.metadata.entry_points(group=group)})]
    near = difflib.get_close_matches(name, known, n=1)
    choices = f"one of {', '.join(known)}, or module:name of your own" if known else "module:name of your own"
    raise UserError(f"{shown}: '{name}' is not known", f"did you mean '{near[0]}'?" if near else f"give {choices}")
