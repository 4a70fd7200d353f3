"""From a config dataclass to a typer command: flags, `--config run.yaml`, and error reporting, written once."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ssrctl.configs import build_config
from ssrctl.errors import CheckFailed, Stopped, UserError


def command(app: typer.Typer, name: str, config: type, stage: str, *, epilog: str | None = None) -> None:
    """Register subcommand ``name``: its flags are the fields of ``config``, its body calls ``stage``.

    Args:
        app: where to register.
        name: the subcommand.
        config: a dataclass of ``ssrctl.configs``; its docstring is the help text, the string under each
            field is the flag's help. Fields with metadata ``argument=True`` are positional, metadata
            ``flags`` adds short forms.
        stage: ``module:function`` taking the config; imported only when the command runs. A dict that it
            returns is the machine-readable result, printed on stdout under ``--json``.
        epilog: a line under the help.
    """

    def body(ctx: typer.Context, **values: Any) -> None:
        given = {
            key: value
            for key, value in values.items()
            if ctx.get_parameter_source(key).name in ("COMMANDLINE", "ENVIRONMENT")  # type: ignore[union-attr]
        }
        config_path = given.pop("config", None)

        def run() -> int:
            made: Any = build_config(config, given, config_path)
            module, function = stage.split(":")
            result = getattr(importlib.import_module(module), function)(made)
            if made.json and result is not None:
                sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
            return 0

        raise typer.Exit(run_guarded(run))

    body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *_parameters(config),
        ]
    )
    body.__doc__ = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(config) or "").split("\n\n"))
    app.command(name, epilog=epilog)(body)


def _parameters(config: type) -> list[inspect.Parameter]:
    docs = field_docs(config)
    hints = typing.get_type_hints(config)
    parameters = []
    for spec in dataclasses.fields(config):
        flag = "--" + spec.name.replace("_", "-")
        help_text = docs[spec.name]
        default: Any = spec.default if spec.default is not dataclasses.MISSING else None
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        annotation = hints[spec.name]
        if default is None and not _is_optional(annotation):
            annotation = annotation | None  # presence is checked once, by build_config
        info: Any
        if spec.metadata.get("argument"):
            info = typer.Argument(help=help_text, show_default=False, metavar=spec.metadata.get("metavar"))
        elif annotation is bool:
            info = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text)
        else:
            info = typer.Option(
                flag, *spec.metadata.get("flags", ()), help=help_text, show_default=default not in (None, [])
            )
        parameters.append(
            inspect.Parameter(
                spec.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
            )
        )
    config_info = typer.Option("--config", help="Read settings from this yaml file; flags win over it.")
    parameters.append(
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config_info]
        )
    )
    return parameters


def _is_optional(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in typing.get_args(
        annotation
    )


def field_docs(config: type) -> dict[str, str]:
    """The string literal under each field of a dataclass and its bases, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        docs |= _docs_by_class(base.__module__).get(base.__name__, {})
    missing = [spec.name for spec in dataclasses.fields(config) if spec.name not in docs]
    assert not missing, f"{config.__name__}: no doc line under {', '.join(missing)}"
    return docs


@functools.cache
def _docs_by_class(module: str) -> dict[str, dict[str, str]]:
    """{class: {field: doc line}} of a module, from its source, parsed once."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs = found[node.name] = {}
        for spec, after in itertools.pairwise(node.body):
            if (
                isinstance(spec, ast.AnnAssign)
                and isinstance(spec.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[spec.target.id] = " ".join(str(after.value.value).split())
    return found


def dashed(argv: list[str]) -> list[str]:
    """Accept ``--output_dir`` for ``--output-dir``, as Hugging Face scripts do."""
    out: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return out + argv[position:]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    return out


def run_guarded(call: Callable[[], int]) -> int:
    """Run ``call``; print a ``UserError`` as one or two lines; map the outcome to the exit code of the contract.

    Returns:
        0 success, 2 user error, 3 stopped early with what was done kept, 4 a check that was
        asked for does not hold, 1 anything else (Ctrl-C included).
    """
    try:
        return call()
    except UserError as error:
        say_error(error.message, error.remedy)
        return 2
    except Stopped as stop:
        say_error(stop.message, stop.remedy, title="stopped: ")
        return 3
    except CheckFailed as check:
        say_error(check.message, None, title="check failed: ")
        return 4
    except KeyboardInterrupt:
        say_error("interrupted", None)
        return 1
    except MemoryError:
        say_error("out of memory", "use a smaller model, --dtype bfloat16, or smaller batches")
        return 1
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); there is nobody left to tell.
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a folder without permission: nothing that a traceback would explain
        say_error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), None)
        return 1


def say_error(message: str, remedy: str | None, *, title: str = "error: ") -> None:
    """Print an error to stderr; nothing in it is taken as markup."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble((title, "bold red"), message))
    if remedy:
        console.print(Text.assemble(("  fix: ", "bold"), remedy))
