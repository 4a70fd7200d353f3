"""The exceptions that users see."""

from __future__ import annotations

from typing import Any

LONGEST_REASON = 300  # characters of another program's message in ours


class _Reported(Exception):
    """An exception that the command line prints as ``message`` and ``remedy``, a line each, without a traceback.

    Args:
        message: what happened, with the numbers.
        remedy: what to do about it.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message} ({remedy})")
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[_Reported], tuple[str, str | None]]:
        """Keep message and remedy apart when another process gets the exception."""
        return type(self), (self.message, self.remedy)


class UserError(_Reported):
    """An error that the user can fix: a wrong path, a corrupt file, an impossible setting. The exit code is 2."""


class Stopped(_Reported):
    """Work that ended early at a limit that the user set, or for an outage; finished work is kept.

    The exit code is 3, so that a script can tell "continue later" from a mistake (2) and a failure (1).
    """


class Failed(_Reported):
    """A failure that no setting explains, such as another process of the job that ended. The exit code is 1."""


class LostProcess(Failed):
    """An exchange that another process of the job did not take part in, because it has ended."""


class CheckFailed(_Reported):
    """A check that the user asked for failed; its report is written. The exit code is 4, for continuous integration.

    Args:
        message, remedy: as above.
        result: of the command, printed under ``--json``.
    """

    def __init__(self, message: str, remedy: str | None = None, result: dict[str, Any] | None = None) -> None:
        super().__init__(message, remedy)
        self.result = result


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP in a command that kept what was done.

    Args:
        message: what is kept.
        remedy: how to continue.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most ``LONGEST_REASON`` characters; its type where that says more."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines or isinstance(error, (RecursionError, KeyError, IndexError, AssertionError, AttributeError)):
        return f"{kind}: {lines[0][:LONGEST_REASON]}" if lines else kind
    return lines[0][:LONGEST_REASON]
