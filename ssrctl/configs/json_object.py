"""Json objects as the value of a setting: text on the command line, a mapping in a yaml file."""

from __future__ import annotations

import json
from typing import Any

from ssrctl.errors import UserError


def as_json_text(value: Any) -> Any:
    """Return a mapping of a yaml file as json text, and every other value as it is."""
    return json.dumps(value, default=str) if isinstance(value, dict) else value


def parse_json_object(text: str | None, flag: str, example: str) -> dict[str, Any]:
    """Return the object that ``text`` holds; an empty one for None.

    Args:
        text: json.
        flag: name of the setting, for errors.
        example: value that the errors show.

    Raises:
        UserError: not valid json (NaN, infinities and lone surrogates included), or not an object.
    """
    remedy = f"write it as '{example}'"
    try:
        made = json.loads(text or "{}", parse_constant=_refuse_constant)
        json.dumps(made, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        # An error of json.loads holds the whole text, which may be a secret, but its message does not.
        reason = "it holds a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise UserError(f"{flag} is not valid json: {reason}", remedy) from None
    if not isinstance(made, dict):
        raise UserError(f"{flag} must be a json object, got {type(made).__name__}", remedy)
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of json")
