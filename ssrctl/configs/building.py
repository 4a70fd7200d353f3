"""How a config is made and checked.

A config is built in one place, ``build_config``: defaults, then the yaml file of ``--config``, then flags.
Types and choices are checked there, ranges in ``__post_init__``; an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from ssrctl.errors import UserError

Config = TypeVar("Config")


def build_config(kind: type[Config], given: Mapping[str, Any], config_path: Path | None = None) -> Config:
    """Make a config of ``kind`` from flags and, below them, a yaml file.

    Args:
        kind: a dataclass of this module.
        given: values that were given as flags, by field name.
        config_path: a yaml file with a mapping of field names (dashes or underscores) to values.

    Raises:
        UserError: the file is missing or not a mapping, a key is unknown, a value has the wrong type or
            range, or a needed value is absent.
    """
    values: dict[str, Any] = {}
    names = [spec.name for spec in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if config_path is not None:
        for key, value in _read_yaml(config_path).items():
            name = str(key).replace("-", "_")
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise UserError(
                    f"{config_path}: unknown key '{key}'",
                    f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}",
                )
            values[name] = value
    values |= given
    return _validated(kind, values)


def _validated(kind: type[Config], values: Mapping[str, Any]) -> Config:
    import pydantic

    # json-mode strictness would refuse paths given as text, so only types are coerced, never guessed.
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else kind.__name__
        if first["type"] == "missing" or (name in values and values[name] is None):
            raise UserError(f"'{name}' is needed", f"give {_flag(kind, name)}") from None
        raise UserError(f"{_flag(kind, name)}: {first['msg']}, got {first.get('input')!r}") from None


def _flag(kind: type, name: str) -> str:
    for spec in dataclasses.fields(kind):
        if spec.name == name and spec.metadata.get("argument"):
            return spec.metadata.get("metavar") or name.upper()
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"config file not found: {path}", "check the path") from error
    except OSError as error:
        raise UserError(f"config file cannot be read: {path}: {error.strerror}", "name a readable file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}")
    return loaded


def require(condition: bool, flag: str, rule: str, value: Any) -> None:
    if not condition:
        raise UserError(f"{flag} must be {rule}, got {value}")


def positional(*, metavar: str | None = None, default: Any = dataclasses.MISSING) -> Any:
    """A field that is a positional argument on the command line."""
    return field(default=default, metadata={"argument": True, "metavar": metavar})


def output(default: Any = dataclasses.MISSING) -> Any:
    """The `-o` field."""
    return field(default=default, metadata={"flags": ("-o",)})
