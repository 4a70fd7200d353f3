"""Values from outside (jsonl rows, json files, metadata) checked by pydantic, with one-line errors that name the field.

Types are strict and values stay as they are: ``Number`` keeps the difference between 1 and 1.0, and takes no bool.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from annotated_types import Ge
from pydantic import AllowInfNan, Strict, StrictFloat, StrictInt, TypeAdapter, ValidationError

from ssrctl.errors import UserError

Number = StrictInt | StrictFloat
Finite = Annotated[float, Strict(), AllowInfNan(False)]
Count = Annotated[int, Strict(), Ge(0)]

Checked = TypeVar("Checked")
_MOST_SHOWN = 60
_validators: dict[type, TypeAdapter[Any]] = {}  # making one takes milliseconds


def checked(kind: type[Checked], value: object, where: str, remedy: str | None = None) -> Checked:
    """Return ``value`` as ``kind``, a type that pydantic knows (a dataclass is made from a dict).

    Args:
        kind: the type.
        value: parsed json.
        where: the file, and the line or part of it, for messages.
        remedy: of the error.

    Raises:
        UserError: the first field that does not fit, by its path (``steps[0].kind``), and the value found.
    """
    try:
        if kind not in _validators:
            _validators[kind] = TypeAdapter(kind)
        made: Checked = _validators[kind].validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {_problem(error)}", remedy) from error
    return made


def _problem(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first, place = errors[0], errors[0]["loc"]
    if place[-1:] == ("int",) and len(errors) > 1:  # of ``Number``, whose second half has the wider message
        first, place = errors[1], place[:-1]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    field = f"field '{path}'" if path else "it"
    found = repr(first["input"])
    found = found if len(found) <= _MOST_SHOWN else type(first["input"]).__name__
    match first["type"]:
        case "missing":
            return f"{field} is missing"
        case "unexpected_keyword_argument":
            return f"{field} is not known"
        case "value_error":
            return f"{field} is malformed: {first['ctx']['error']}"
    return f"{field} {first['msg'].replace('Input should', 'must')}, found {found}"
