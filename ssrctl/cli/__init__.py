"""The `ssrctl` command line. Heavy libraries are imported by the stages, after parsing."""

from __future__ import annotations

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
    """Run the console script."""
    sys.exit(main())
