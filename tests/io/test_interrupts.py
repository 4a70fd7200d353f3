"""SIGTERM and SIGHUP do what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssrctl.cli.glue import run_guarded
from ssrctl.errors import Interrupted
from ssrctl.io.interrupts import deferred_interrupt, termination_as_interrupt


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Let a test start from Python's own handlers, whatever the shell of the tests ignores, and leave none behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_with_code_3_and_says_how_to_continue(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        os.kill(os.getpid(), number)
        pytest.fail("the signal was lost")

    assert run_guarded(work) == 3
    shown = capfd.readouterr().err
    assert f"stopped: {number.name}" in shown and "run the same command again" in shown
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_is_kept_and_how_to_continue_are_shown_for_ctrl_c_too(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise Interrupted("after step 3 of 6", "to continue: so")

    assert run_guarded(work) == 1
    assert capfd.readouterr().err.splitlines() == ["error: interrupted: after step 3 of 6", "  fix: to continue: so"]


def test_a_step_is_finished_and_a_second_sigterm_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with termination_as_interrupt() as terminated_by, deferred_interrupt() as interrupted:
        assert not interrupted() and terminated_by() is None
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted() and terminated_by() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("SIGTERM: finishing this step") == 1


def test_where_the_shell_ignores_ctrl_c_sigterm_still_ends_the_command() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), termination_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with termination_as_interrupt() as terminated_by:
        os.kill(os.getpid(), signal.SIGHUP)
        assert terminated_by() is None


def test_a_lost_terminal_does_not_end_what_is_being_finished() -> None:
    code = """
import os, signal, sys
from ssrctl.io.console import note
from ssrctl.io.interrupts import deferred_interrupt, termination_as_interrupt
with termination_as_interrupt(), deferred_interrupt() as interrupted:
    os.write(3, b"ready")
    while not interrupted():
        signal.pause()
    note("still writing")
    os.write(3, b" saved")
"""
    ours, theirs = os.openpty()
    reading, writing = os.pipe()
    words = [sys.executable, "-c", f"import os; os.dup2({writing}, 3)\n" + code]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, pass_fds=[writing])
    os.close(writing)
    os.close(theirs)
    assert os.read(reading, 100) == b"ready"
    os.close(ours)  # what is written to the terminal from now on fails
    process.send_signal(signal.SIGHUP)
    assert os.read(reading, 100) == b" saved" and process.wait(30) == 0
    os.close(reading)


def test_the_exit_code_of_a_module_run_survives_a_signal_in_an_import(tmp_path: Path) -> None:
    """CPython would exit by SIGINT after a KeyboardInterrupt within an exec of text, as dataclasses do it."""
    (tmp_path / "probe.py").write_text(
        "import os, signal, rich.text, ssrctl.cli, ssrctl.io.terminal\n"
        "from ssrctl.cli.glue import run_guarded\n"
        "stop = 'import os, signal; os.kill(os.getpid(), signal.SIGTERM)'\n"
        "ssrctl.cli.main = lambda: run_guarded(lambda: exec(stop))\n"
        "ssrctl.cli.entry_point()\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "probe"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "stopped: SIGTERM")
