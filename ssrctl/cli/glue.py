"""From a config dataclass to a typer command: flags, `--config run.yaml`, and error reporting, written once."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ssrctl.configs import Config, build_config
from ssrctl.configs.building import field_types, ranges
from ssrctl.configs.common import HubOptions
from ssrctl.configs.names import accepted_names, flag
from ssrctl.errors import CheckFailed, Failed, Interrupted, LostProcess, Stopped, UserError
from ssrctl.io.console import note
from ssrctl.io.interrupts import termination_as_interrupt
from ssrctl.io.manifest import settings_of, write_settings
from ssrctl.io.package_data import profile_path
from ssrctl.io.visible import visible
from ssrctl.process_rank import comes_from_launcher, is_ours, num_launched, rank

_DEFAULTS_GIVEN = "ssrctl.defaults_given"
_WORDS = "ssrctl.words"
_LONGEST_MESSAGE = 1200
_METAVARS = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
_OBVIOUS_RANGES = {"at least 1", "0 or more", "above 0"}  # not worth a sentence in the help


def command(app: typer.Typer, name: str, config: type[Config], stage: str, *, hidden: bool = False) -> None:
    """Register subcommand ``name``: its flags are the fields of ``config``, its body calls ``stage``.

    Args:
        app: application or group to register with.
        name: the subcommand.
        config: a dataclass of ``ssrctl.configs``; its docstring is the help text and ends with an example, the string under each
            field is the flag's help, the ``panel`` of the class that defines a field is the help's panel. Fields with
            metadata ``metavar`` are positional, and ``flags`` adds short forms.
        stage: ``module:function`` taking the config; imported only when the command runs. A dict that it
            returns is the machine-readable result, printed on stdout under ``--json``.
        hidden: leave the command out of the help, such as a second name of another.
    """

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            ctx.meta[_WORDS] = list(args)
            words, ctx.meta[_DEFAULTS_GIVEN] = current_words(config, args)
            return super().parse_args(ctx, words)

    def body(ctx: typer.Context, **values: Any) -> None:
        given = dict(ctx.meta[_DEFAULTS_GIVEN])
        for key, value in values.items():
            if ctx.get_parameter_source(key).name in ("COMMANDLINE", "ENVIRONMENT"):  # type: ignore[union-attr]
                given |= {key.removeprefix("no_"): False} if key.startswith("no_") else {key: value}
        recipe, config_path, save_to = (given.pop(name, None) for name in ("recipe", "config", "save_config"))

        made: Any = None
        result: dict[str, Any] | None = None

        def run() -> int:
            nonlocal made, result
            files = [] if recipe is None else [profile_path("recipes", recipe, ".yaml")]
            made = build_config(config, given, *files, *([] if config_path is None else [config_path]))
            if save_to is not None:
                write_settings(save_to, settings_of(made))
                note(f"settings -> {save_to}")
                return 0
            if num_launched() > 1 and not made.several_processes:
                raise UserError(
                    f"`ssrctl {name}` runs in one process, {num_launched()} were launched",
                    "start it without a launcher",
                )
            if isinstance(made, HubOptions) and made.push_to_hub is not None:
                from ssrctl.io.hub import check_can_push

                check_can_push(made.push_to_hub)
            if made.several_processes and made.launches and not (made.dry_run or comes_from_launcher()):
                from ssrctl.distributed.launch import launch

                return launch([name, *ctx.meta[_WORDS]], made.num_processes, made.accelerate_config)
            result = _run_stage(stage, made)
            return 0

        code = run_guarded(run)
        raise typer.Exit(code if made is None else made.exit_status(code, result))

    body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *_parameters(config),
        ]
    )
    *paragraphs, example = (" ".join(part.split()) for part in (inspect.getdoc(config) or "").split("\n\n"))
    assert example.startswith("Example: "), config
    body.__doc__ = "\n\n".join(paragraphs)
    app.command(name, cls=Command, epilog=example, hidden=hidden)(body)


def _run_stage(stage: str, config: Any) -> dict[str, Any] | None:
    """Call a stage, upload what it wrote if that is asked for, print its result under ``--json``, and return it."""
    try:
        result = stage_function(stage)(config)
    except CheckFailed as check:
        if config.json and check.result is not None:
            _print_json(check.result)
        raise
    if result is None or rank() > 0:
        return result
    try:
        if isinstance(config, HubOptions) and config.push_to_hub is not None and not config.dry_run:
            from ssrctl.stages.push import push_written

            written: Any = config
            path = Path(result.get("run") or written.output)
            result["pushed"] = push_written(path, config.push_to_hub, private=config.hub_private_repo)
    finally:
        if config.json:
            _print_json(result)
    return result


def stage_function(stage: str) -> Callable[[Any], dict[str, Any] | None]:
    """Import ``module:function``."""
    module, function = stage.split(":")
    found: Callable[[Any], dict[str, Any] | None] = getattr(importlib.import_module(module), function)
    return found


def _parameters(config: type[Config]) -> list[inspect.Parameter]:
    """Return the parameters of a command; those of a class of settings that comes earlier in the bases come first."""
    specs = {spec.name: spec for spec in dataclasses.fields(config)}
    parameters, seen = [], set[str]()
    for base in config.__mro__:
        for name in vars(base).get("__annotations__", {}):
            if name in specs and name not in seen:
                seen.add(name)
                parameters.append(_parameter(config, specs[name], vars(base).get("panel")))
    read = typer.Option("--config", help="Read settings from this yaml file; flags win over it.", metavar="PATH")
    save = typer.Option("--save-config", help="Write all settings to this yaml file and stop.", metavar="PATH")
    parameters += [_keyword("config", None, Path | None, read), _keyword("save_config", None, Path | None, save)]
    if config.has_recipes:
        text = "Read settings from this recipe (`ssrctl recipes` lists them); --config and flags win over it."
        recipe = typer.Option("--recipe", help=text, metavar="NAME")
        parameters.append(_keyword("recipe", None, str | None, recipe))
    return parameters


def _parameter(config: type[Config], spec: dataclasses.Field[Any], panel: str | None) -> inspect.Parameter:
    hint = _bare(field_types(config)[spec.name])
    text, shown = help_text(config, spec.name), flag(config, spec.name)
    default: Any = None if spec.default is dataclasses.MISSING else spec.default
    if spec.default_factory is not dataclasses.MISSING:
        default = spec.default_factory()
    if hint is bool:
        name = f"no_{spec.name}" if default else spec.name
        shown = f"--no-{shown[2:]}" if default else shown
        info = typer.Option(shown, help=text, rich_help_panel=panel, show_default=False, metavar="")
        return _keyword(name, False, bool, info)
    if "metavar" in spec.metadata:
        return _keyword(spec.name, default, hint | None, typer.Argument(help=text, show_default=False, metavar=shown))
    flags, visible = spec.metadata.get("flags", ()), default not in (None, [])
    info = typer.Option(shown, *flags, help=text, rich_help_panel=panel, show_default=visible, metavar=_metavar(hint))
    return _keyword(spec.name, default, hint | None, info)


def _keyword(name: str, default: Any, hint: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])


def _bare(hint: Any) -> Any:
    """Return an annotation without constraints and without ``| None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (inner for inner in typing.get_args(hint) if inner is not type(None))
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "CHOICE"
    return _METAVARS[typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint]


def help_text(config: type[Config], name: str) -> str:
    """Return a flag's help: the field's doc line, and its choices and range where the line does not name them."""
    text = field_docs(config)[name]
    hint = _bare(field_types(config)[name])
    if hint is bool and getattr(config, name):
        return f"Do not {text[0].lower()}{text[1:]}"
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if not all(re.search(rf"\b{re.escape(choice)}\b", text) for choice in choices):
        text += f" One of {', '.join(choices)}."
    words = ranges(config).get(name, "at least 1")
    return text if words.removesuffix(" and finite") in _OBVIOUS_RANGES else f"{text} {words[0].upper()}{words[1:]}."


def field_docs(config: type) -> dict[str, str]:
    """Return the string literal under each field of a dataclass and its bases, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        docs |= _docs_by_class(base.__module__).get(base.__name__, {})
    missing = [spec.name for spec in dataclasses.fields(config) if spec.name not in docs]
    assert not missing, f"{config.__name__}: no doc line under {', '.join(missing)}"
    return docs


@functools.cache
def _docs_by_class(module: str) -> dict[str, dict[str, str]]:
    """Return {class: {field: doc line}} of a module, from its source, parsed once."""
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


def current_words(config: type[Config], argv: list[str]) -> tuple[list[str], dict[str, bool]]:
    """Return the words of a command line with today's flags, and the switches that were set to their default.

    Underscores in flags are accepted, as Hugging Face scripts write them, and so are aliases. A switch has a flag only
    for the value that is not its default; the other one, which may be needed on top of a yaml file, is taken out of the
    words.
    """
    words: list[str] = []
    defaults: dict[str, bool] = {}
    specs = {spec.name: spec for spec in dataclasses.fields(config)}
    others = accepted_names(config)
    for position, word in enumerate(argv):
        if word == "--":
            return words + argv[position:], defaults
        if not word.startswith("--"):
            words.append(word)
            continue
        given, equals, value = word.partition("=")
        given = given.replace("_", "-")
        key = given[2:].replace("-", "_")
        is_off = key.startswith("no_") and key not in specs
        key = key.removeprefix("no_") if is_off else key
        spec = specs.get(others.get(key, key))
        if spec is None or "metavar" in spec.metadata or (is_off and not isinstance(spec.default, bool)):
            words.append(given + equals + value)
            continue
        now = ("--no-" if is_off else "--") + flag(config, spec.name)[2:]
        if isinstance(spec.default, bool) and spec.default is not is_off:
            defaults[spec.name] = spec.default
            continue
        words.append(now + equals + value)
    return words, defaults


def warn(text: str) -> None:
    """Print a warning to stderr; of several processes only the first one does."""
    if rank() == 0:
        sys.stderr.write(f"warning: {visible(text)}\n")


def run_guarded(call: Callable[[], int]) -> int:
    """Run ``call``; print a ``UserError`` as one or two lines; return the exit code of the outcome.

    SIGTERM and SIGHUP end the call as Ctrl-C does.

    Returns:
        0 success, 2 user error, 3 stopped early with the finished work kept (SIGTERM and SIGHUP included), 4 a check
        that was asked for failed, 1 anything else (Ctrl-C included).
    """
    with termination_as_interrupt() as terminated_by:
        return _guarded(call, terminated_by)


def _guarded(call: Callable[[], int], terminated_by: Callable[[], str | None]) -> int:
    try:
        return call()
    except UserError as error:
        say_error(error.message, error.remedy)
        return 2
    except Failed as failure:
        if not (isinstance(failure, LostProcess) and is_ours()):  # our launcher says which process has ended
            say_error(failure.message, failure.remedy)
        return 1
    except Stopped as stop:
        say_error(stop.message, stop.remedy, title="stopped: ")
        return 3
    except CheckFailed as check:
        say_error(check.message, check.remedy, title="check failed: ")
        return 4
    except KeyboardInterrupt as interrupt:
        kept, remedy = (interrupt.message, interrupt.remedy) if isinstance(interrupt, Interrupted) else (None, None)
        signal = terminated_by()
        if signal is not None:
            say_error(
                f"{signal}: {kept}" if kept else signal, remedy or "run the same command again", title="stopped: "
            )
            return 3
        say_error(f"interrupted: {kept}" if kept else "interrupted", remedy)
        return 1
    except MemoryError:
        say_error("out of memory", "use a smaller model, --dtype bfloat16, or smaller batches")
        return 1
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`), and nobody is left to read a message.
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a folder without permission: a traceback would explain nothing
        say_error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), None)
        return 1


def _print_json(result: dict[str, Any]) -> None:
    text = json.dumps(result, ensure_ascii=False)
    # Lone surrogates, of a file name for instance, have no form in UTF-8, but json can escape them.
    sys.stdout.write((text if _is_unicode(text) else json.dumps(result)) + "\n")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def say_error(message: str, remedy: str | None, *, title: str = "error: ") -> None:
    """Print an error to stderr, without reading it as markup; values of a file in it may be long, and are cut.

    Of the processes of a job only the first to have an error prints it: the others fail for want of that one.
    """
    from rich.text import Text

    from ssrctl.io.terminal import SafeConsole

    if num_launched() > 1:
        from ssrctl.distributed.world import speaks_first

        if not speaks_first():
            return
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}..."
    console = SafeConsole(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble((title, "bold red"), message))
    if remedy:
        console.print(Text.assemble(("  fix: ", "bold"), remedy))
