"""Ctrl-C, SIGTERM and SIGHUP end a command in the same orderly way."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from ssrctl.io.console import note
from ssrctl.process_rank import is_launched

_REPEATED_SECONDS = 5.0
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_received: list[str] = []  # name of the terminating signal that ended the command, if one did


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[Callable[[], str | None]]:
    """Let the first SIGTERM or SIGHUP do what Ctrl-C does.

    Yields a function that returns the name of the signal that came, None if none came. Further ones are ignored, since
    `timeout` and job schedulers send a signal twice. A signal that the parent ignores, as under `nohup`, stays ignored.
    After SIGHUP output that went to the terminal goes to /dev/null. Outside the main thread, where signals cannot be
    caught, nothing is changed.
    """
    _received.clear()
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handler(number: int, frame: object) -> None:
        if _received:
            return
        _received.append(signal.Signals(number).name)
        if number == signal.SIGHUP:
            for descriptor in terminals:  # writing to a terminal that is gone would raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job of a script
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = {}
    try:
        for number in _TERMINATING:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:
        yield lambda: None
        return
    try:
        yield lambda: _received[0] if _received else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the current step finish on Ctrl-C, SIGTERM or SIGHUP.

    Yields a function that tells whether one of them came. A second Ctrl-C interrupts at once; under a launcher, which
    repeats a signal that the terminal has sent already, not in the first seconds. Outside the main thread, where signals
    cannot be caught, nothing is changed.
    """
    pressed = False
    first = 0.0

    def handler(number: int, frame: object) -> None:
        nonlocal pressed, first
        if pressed:
            if is_launched() and time.monotonic() - first < _REPEATED_SECONDS:
                return
            raise KeyboardInterrupt
        pressed, first = True, time.monotonic()
        note(f"{_received[0] if _received else 'Ctrl-C'}: finishing this step; press Ctrl-C again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
