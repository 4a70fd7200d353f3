"""Import and use of critics and rewards that users bring, with one line that names them for every failure."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ssrctl.configs.own_code import entry_point
from ssrctl.critics.base import Critic
from ssrctl.errors import Failed, Stopped, UserError
from ssrctl.io.records import Rollout, StepScore

_PACKAGE = str(Path(__file__).parent.parent)
_IMPORTLIB = str(Path(importlib.__file__).parent)
REPAIR = "repair it and run the same command again"


def load(what: str, name: str, group: str) -> Any:
    """Import the object that ``module:name`` or an entry point names; modules in the current folder are found too.

    Args:
        what: the kind of object, for errors.
        name: ``module:name``, or the name of an entry point.
        group: its group of entry points.

    Raises:
        UserError: the import fails, or the module does not have the name.
    """
    point = entry_point(group, name)
    module, _, attribute = (name if point is None else point.value).partition(":")
    if str(Path.cwd()) not in sys.path:  # last, so that no file of the folder hides a module of Python
        sys.path.append(str(Path.cwd()))
    with blamed(
        f"{what} {name}", UserError, "check the name; modules of the current folder and of installed packages are found"
    ):
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    return found


@contextlib.contextmanager
def blamed(who: str, kind: type[UserError | Stopped], remedy: str = REPAIR) -> Iterator[None]:
    """Convert an exception of a user's code into ``kind``; the message names the code, the exception and its line.

    The exceptions of this package pass, and so do those that are not errors (Ctrl-C).
    """
    try:
        yield
    except (UserError, Stopped, Failed):
        raise
    except (Exception, SystemExit) as error:  # a script that was named as a module may call sys.exit
        frames = [
            f"{Path(frame.filename).name}, line {frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith((_PACKAGE, _IMPORTLIB, "<")) and "site-packages" not in frame.filename
        ]
        place = f" ({frames[-1]})" if frames else ""
        text = " ".join(str(error).split())
        raise kind(f"the {who} raised {type(error).__name__}: {text}{place}", remedy) from error


class OwnCritic:
    """A critic of a user: its exceptions and its mistakes become one line that names it.

    Args:
        name: as the user spells it.
        critic: the object; only ``stream`` is needed, the other members of ``Critic`` have defaults.
    """

    def __init__(self, name: str, critic: Any) -> None:
        self._who, self._critic = f"critic {name}", critic
        if not callable(getattr(critic, "stream", None)):
            raise UserError(f"the {self._who} has no method 'stream'", "derive its class from ssrctl.ResponseCritic")

    @property
    def identity(self) -> str | None:
        with blamed(self._who, Stopped):
            identity = getattr(self._critic, "identity", None)
        return None if identity is None else str(identity)

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield the critic's scores; raise Stopped for too few, too many, or other things than scores."""
        waiting: dict[int, Rollout] = {}

        def counted() -> Iterator[Rollout]:
            for rollout in rollouts:
                waiting[id(rollout)] = rollout
                yield rollout

        with blamed(self._who, Stopped):
            for rollout, scores in self._critic.stream(counted()):
                if waiting.pop(id(rollout), None) is None:
                    raise self._mistake("yielded a response that it was not given, or one twice")
                scores = list(scores)
                if len(scores) != len(rollout.steps or ()):
                    raise self._mistake(
                        f"gave {len(scores)} scores for the {len(rollout.steps or ())} steps of {rollout.id}"
                    )
                if odd := [score for score in scores if not isinstance(score, StepScore)]:
                    raise self._mistake(f"gave a {type(odd[0]).__name__} as a score of {rollout.id}, not a StepScore")
                yield rollout, scores
        if waiting:
            raise self._mistake(f"left out {len(waiting)} responses, the first is {next(iter(waiting.values())).id}")

    def summary(self) -> dict[str, Any]:
        """Return the critic's summary; empty if it has none."""
        with blamed(self._who, Stopped):
            return dict(self._critic.summary()) if hasattr(self._critic, "summary") else {}

    def close(self) -> None:
        """Close the critic, if it can be closed."""
        with blamed(self._who, Stopped):
            if hasattr(self._critic, "close"):
                self._critic.close()

    def _mistake(self, text: str) -> Stopped:
        return Stopped(f"the {self._who} {text}", REPAIR)


def make_own_critic(name: str, kind: Any, *arguments: Any) -> Critic:
    """Make a critic of a user's class, with its class method ``create(options, resources)`` if it has one."""
    with blamed(f"critic {name}", UserError):
        made = kind.create(*arguments) if hasattr(kind, "create") else kind()
    return OwnCritic(name, made)
