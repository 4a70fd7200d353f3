"""One process per output."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ssrctl.errors import UserError
from ssrctl.io.locks import locked_file, locked_folder

HOLD = """
import sys
from pathlib import Path
from ssrctl.io.locks import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_a_kill_releases_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"), locked_folder(folder):
            pytest.fail("two processes hold one folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (folder / ".lock").exists()
    with locked_folder(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert list(folder.iterdir()) == []


def test_only_an_empty_new_folder_is_removed(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_files_of_one_folder_are_locked_one_by_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with locked_file(one), locked_file(two), pytest.raises(UserError, match=r"one\.jsonl is in use"), locked_file(one):
        pytest.fail("held twice")
    assert list(tmp_path.iterdir()) == []


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked_folder(tmp_path):
        assert "is not locked (No locks available)" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), locked_folder(tmp_path / "file" / "run"):
        pytest.fail("not a folder")
