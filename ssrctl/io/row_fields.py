"""Fields of the rows that users bring: chat messages, answers, and columns within columns.

``docs/formats.md`` has the table of formats. A row is a parsed json object, or a row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.boxed import last_boxed
from ssrctl.io.jsonl import parse_json

# A chat message as chat templates take it: role, content, and further keys such as a name.
Message = dict[str, Any]
# A reference answer: one text, or several of which any is right.
Reference = str | tuple[str, ...]

# Columns of verl's data sets, which csv files and some parquet files hold as json text.
_VERL_OBJECTS = ("reward_model", "extra_info")
_ANSWER_KEYS = ("ground_truth", "value", "answer", "text")
_MOST_SHOWN = 60


def lookup(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Return the value of a column, or of a field within it (``reward_model.ground_truth``); None if absent.

    Raises:
        UserError: a column of verl's that begins like a json object and is not one.
    """
    if name in row and "." in name:
        return row[name]
    column, *inner = name.split(".")
    value = row.get(column)
    if column in _VERL_OBJECTS and isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parsed(value, f"{where}: field '{column}'")
    for key in inner:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_empty(value: Any) -> bool:
    """Return True for a cell that counts as absent: None, NaN (an empty cell of a table), blank text, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, Sequence | Mapping) and not value)


def is_messages(value: Any) -> bool:
    """Return True for a list whose entries look like chat messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(m, Mapping) for m in value)


def messages_of_row(row: Mapping[str, Any], name: str, where: str) -> list[Message] | None:
    """Return the chat messages in a column, or None if it holds something else.

    Text that begins like a json list counts in a row of verl's only.

    Raises:
        UserError: malformed messages, see ``read_messages``.
    """
    value = lookup(row, name, where)
    if isinstance(value, str) and "reward_model" in row and value.lstrip().startswith("[{"):
        value = _parsed(value, f"{where}: field '{name}'")
    return read_messages(value, f"{where}: field '{name}'") if is_messages(value) else None


def read_messages(value: Sequence[Any], where: str) -> list[Message]:
    """Check chat messages, whose last must be the user's, and return them with their content as text.

    Args:
        value: objects with ``role`` and ``content``; content is text or a list of parts of type text. Other keys are
            kept, except those that hold None.
        where: the row and the field, for messages.

    Raises:
        UserError: an entry that is not such an object, content that is not text, or another last role.
    """
    messages: list[Message] = []
    for number, entry in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
            raise UserError(
                f"{place} is not a chat message: {shown(entry)}", 'a message is {"role": "user", "content": "..."}'
            )
        kept = {str(key): item for key, item in entry.items() if item is not None}
        messages.append(kept | {"content": message_text(entry.get("content"), place)})
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: the last message is of the role {shown(messages[-1]['role'])}, expected 'user'",
            "leave out the messages after the user's last one; the reference answer goes into its own column",
        )
    return messages


def message_text(content: Any, place: str) -> str:
    """Return a message's content as text; parts of type text are joined.

    Raises:
        UserError: something else, such as an image.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and content:
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        others = any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in content)
        if not others and all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if text is not None)
    raise UserError(f"{place}.content must be text, found {shown(content)}", "only text can be given to the model")


def read_answer(value: Any, where: str, name: str) -> Reference:
    """Return a reference answer: text or a number as text; a list of one as its element, a longer list as a tuple.

    Args:
        value: a cell that is not empty.
        where: the row, for messages.
        name: the field.

    Raises:
        UserError: an object, a truth value, a number that is not finite, or a list with any of them.
    """
    place = f"{where}: field '{name}'"
    if isinstance(value, Mapping):
        inner = ", ".join(str(key) for key in value)
        raise UserError(
            f"{place} is an object with the fields {inner[:200]}; an answer is text, a number or a list of them",
            f"name the field in it, such as {name}.{next((key for key in _ANSWER_KEYS if key in value), next(iter(value)))}",
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        accepted = dict.fromkeys(_scalar(item, f"{place}[{number}]") for number, item in enumerate(value))
        return next(iter(accepted)) if len(accepted) == 1 else tuple(accepted)
    return _scalar(value, place)


def final_answer(text: str) -> str:
    """Return the final answer of a worked solution: its last ``\\boxed{...}``, or the part after the last ``####``."""
    return last_boxed(text) or text.rsplit("####", 1)[-1].strip()


def read_text(value: Any, where: str, name: str) -> str:
    """Return a cell that must be text.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' must be text, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value for a message: as it is if short, else its type."""
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and value.bit_length() < 200):
        text = repr(value)
        return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return f"a value of type {type(value).__name__}"


def _scalar(value: Any, place: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UserError(f"{place} must be text or a number, found {shown(value)}")


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} begins like json and is not: {error}", "fix or remove that row") from error
