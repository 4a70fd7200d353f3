"""The `ssrctl` command line. Heavy libraries are imported by the stages, after parsing."""

from __future__ import annotations

import signal
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 2 user error, 1 anything else.

    Args:
        argv: the words after ``ssrctl``; the process's own when None.
    """
    from ssrctl.cli.app import app

    try:
        app(sys.argv[1:] if argv is None else argv, prog_name="ssrctl")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def entry_point() -> None:
    """Run the console script, and exit with its code whatever signal comes while Python shuts down."""
    code = main()
    for number in (signal.SIGTERM, signal.SIGHUP):  # the command has ended: there is nothing left to stop
        signal.signal(number, signal.SIG_IGN)
    # A KeyboardInterrupt that passed through an exec of text, as in the import of a dataclass, would turn the exit code of
    # ``python -m`` into that of SIGINT (CPython's unhandled_keyboard_interrupt), until text is executed without one.
    exec("")
    sys.exit(code)
