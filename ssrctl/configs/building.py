"""How a config is made and checked.

``build_config`` puts defaults, the yaml files of ``--recipe`` and ``--config`` and flags on top of each other. Types, choices and ranges
are declared in a field's annotation and checked by pydantic whenever a config is constructed, also in code and by
``dataclasses.replace``; checks across fields follow in ``__post_init__``. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import reprlib
import sys
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from annotated_types import Ge, Gt, Interval, Le, Lt

from ssrctl.configs.names import accepted_names, flag, once_per_class
from ssrctl.errors import UserError

AtLeastOne = Annotated[int, Ge(1)]
ZeroOrMore = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(gt=0, le=1)]
Fraction = Annotated[float, Interval(gt=0, lt=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Finite = Lt(float("inf"))

Made = TypeVar("Made", bound="Config")


@dataclass(kw_only=True)
class Config:
    """Base of all configs: checks the fields' types, choices and ranges on construction.

    Subclasses check combinations of fields in a ``__post_init__`` that calls this one first.

    Raises:
        UserError: a value has the wrong type or is out of its range.
    """

    panel: ClassVar[str | None] = None  # where `--help` shows the fields that a class defines itself
    several_processes: ClassVar[bool] = False  # True for a command that divides its work among the processes of a job
    has_recipes: ClassVar[bool] = False  # True for a command whose settings `--recipe` takes from profiles/recipes

    def __post_init__(self) -> None:
        vars(self).update(_checked(type(self), vars(self)))

    def exit_status(self, code: int, result: Mapping[str, Any] | None) -> int:
        """Return the exit code of the command, given the usual one and the result; ``code`` unless a setting changes it."""
        return code

    @classmethod
    def idle_in_files(cls, given: Mapping[str, Any]) -> Collection[str]:
        """Return the fields that files may name without effect beside the given flags; as flags they are refused."""
        return ()


def build_config(kind: type[Made], given: Mapping[str, Any], *files: Path) -> Made:
    """Make a config of ``kind`` from flags and, below them, yaml files.

    Args:
        kind: a subclass of ``Config``.
        given: values of the given flags, by field name.
        files: yaml files with a mapping of field names (dashes or underscores) to values, a later one above an earlier
            one.

    Raises:
        UserError: a file is missing or not a mapping, a key is unknown, a value has the wrong type or
            range, or a needed value is absent.
    """
    specs = dataclasses.fields(kind)
    values: dict[str, Any] = {}
    for path in files:
        values |= _fields_of_yaml(kind, path)
    for spec in specs:
        if spec.name in values and spec.name not in given:
            _refuse_code(kind, spec, values[spec.name])
    idle = [name for name in kind.idle_in_files(given) if name in values and name not in given]
    if idle:
        sys.stderr.write(f"note: of the file's settings {', '.join(idle)} have no effect here\n")
    values = {name: value for name, value in values.items() if name not in idle} | dict(given)
    for spec in specs:
        if spec.name not in values and spec.default is spec.default_factory is dataclasses.MISSING:
            raise _needed(kind, spec.name)
    return kind(**values)


def _refuse_code(kind: type[Config], spec: dataclasses.Field[Any], value: Any) -> None:
    """Raise a UserError for code that only a file names or allows: reading a file must not decide which code is run."""
    shown = spec.name if "metavar" in spec.metadata else flag(kind, spec.name)
    if spec.metadata.get("allows_code") and value != default_of(spec):
        raise UserError(
            f"{shown} comes from a file, and decides which code is run", "if you trust it, give it on the command line"
        )
    if not spec.metadata.get("names_code"):
        return
    named = [one for one in (value if isinstance(value, list) else [value]) if ":" in str(one)]
    if named:
        raise UserError(
            f"{shown} {named[0]} comes from a file, and would be imported",
            "if you trust that code, give it on the command line: " + " ".join(f"{shown} {one}" for one in named),
        )


@once_per_class
def field_types(kind: type) -> dict[str, Any]:
    """Return the annotation of each field, with its constraints.

    Does what ``typing.get_type_hints`` does, but evaluates the annotations of a class that many configs share once.
    """
    found = {name: hint for base in reversed(kind.__mro__) for name, hint in _own_types(base).items()}
    return {spec.name: found[spec.name] for spec in dataclasses.fields(kind)}


@once_per_class
def _own_types(base: type) -> dict[str, Any]:
    return inspect.get_annotations(base, eval_str=True)


def value_range(constraints: Mapping[str, Any]) -> str:
    """Return the words for a range that has any of the bounds gt, ge, lt and le: "at least 1", "in (0, 1]"."""
    finite = " and finite" if constraints.get("lt") == float("inf") else ""
    bounds = {key: f"{value:g}" for key, value in constraints.items() if abs(value) != float("inf")}
    low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
    if low is None or high is None:
        words = {"gt": f"above {low}", "ge": "0 or more" if low == "0" else f"at least {low}"}
        words |= {"lt": f"below {high}", "le": f"at most {high}"}
        return "".join(words[key] for key in bounds) + finite
    if "gt" in bounds and "lt" in bounds:
        return f"between {low} and {high}"
    return f"in {'(' if 'gt' in bounds else '['}{low}, {high}{')' if 'lt' in bounds else ']'}"


@once_per_class
def ranges(kind: type) -> dict[str, str]:
    """Return the words for the range of each field that has one."""
    found = {}
    for name, hint in field_types(kind).items():
        if bounds := dict(_bounds(hint)):
            found[name] = value_range(bounds)
    return found


def _bounds(hint: Any) -> Iterator[tuple[str, Any]]:
    """Yield the bounds in an annotation, also inside of ``X | None``."""
    for mark in getattr(hint, "__metadata__", ()):
        for bound in mark if isinstance(mark, Interval) else [mark]:
            if isinstance(bound, Gt | Ge | Lt | Le):
                yield from dataclasses.asdict(bound).items()
    if not hasattr(hint, "__metadata__"):
        for inner in typing.get_args(hint):
            yield from _bounds(inner)


def _checked(kind: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the types of their fields, or raise for the first that does not fit."""
    import pydantic

    try:
        return dict(vars(_checker(kind).validate_python(dict(values))))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if values[name] is None:
            raise _needed(kind, name) from None
        if first.get("ctx", {}).keys() & {"gt", "ge", "lt", "le"}:
            raise UserError(
                f"{flag(kind, name)} must be {ranges(kind)[name]}, got {reprlib.repr(first['input'])}"
            ) from None
        raise UserError(f"{flag(kind, name)}: {first['msg']}, got {reprlib.repr(first['input'])}") from None


@once_per_class
def _checker(kind: type) -> Any:
    """Return pydantic's validator of the fields.

    It is built for a plain twin: validating ``kind`` itself would construct it, whose ``__post_init__`` asks for this.
    """
    import pydantic

    twin = dataclasses.make_dataclass(kind.__name__, list(field_types(kind).items()), kw_only=True)
    return pydantic.TypeAdapter(twin)


def _needed(kind: type[Config], name: str) -> UserError:
    return UserError(f"'{name}' is needed", f"give {flag(kind, name)}")


def _fields_of_yaml(kind: type[Config], path: Path) -> dict[str, Any]:
    names = [spec.name for spec in dataclasses.fields(kind)]
    values = {}
    for key, value in _read_yaml(path).items():
        name = str(key).replace("-", "_")
        name = accepted_names(kind).get(name, name)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"{path}: unknown key '{key}'",
                f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}",
            )
        values[name] = value
    return values


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_yaml_loader())  # noqa: S506 (a SafeLoader)
    except FileNotFoundError as error:
        raise UserError(f"config file not found: {path}", "check the path") from error
    except OSError as error:
        raise UserError(f"config file cannot be read: {path}: {error.strerror}", "name a readable file") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}")
    return loaded


@functools.cache
def _yaml_loader() -> Any:
    """Return the safe loader, which refuses a key that occurs twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' occurs twice", node.start_mark)
            return super().construct_mapping(node, deep=deep)

    return Loader


def default_of(spec: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field; ``dataclasses.MISSING`` if it has none."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def positional(*, metavar: str, default_factory: Any = dataclasses.MISSING, default: Any = dataclasses.MISSING) -> Any:
    """Make a field that is a positional argument on the command line."""
    metadata = {"metavar": metavar}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def allows_code(default: Any) -> Any:
    """Make a field whose value decides which code is run: one that is not the default has to be on the command line."""
    return field(default=default, metadata={"allows_code": True})


def output(default: Any = dataclasses.MISSING) -> Any:
    """Make the `-o` field."""
    return field(default=default, metadata={"flags": ("-o",)})
