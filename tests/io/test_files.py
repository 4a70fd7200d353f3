"""Files are written whole or not at all."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssrctl.errors import UserError
from ssrctl.io.files import CannotWrite, existing_file, whole_file, write_text
from ssrctl.io.jsonl import JsonlLog, read_jsonl


def test_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="boom"), whole_file(target) as temporary:
        temporary.write_text("half of the n")
        assert target.read_text() == "old", "the target was written before the end"
        raise RuntimeError("boom")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"], "a temporary file was left behind"


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_replaces_the_old(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "ä.txt"
    write_text(target, "one")
    write_text(target, "zwei ✓")
    assert target.read_text(encoding="utf-8") == "zwei ✓"
    assert [p.name for p in target.parent.iterdir()] == ["ä.txt"]


def test_the_mode_is_the_usual_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "sub" / "link.txt"
    link.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_names_of_full_length_are_taken(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


def test_what_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / ("n" * 256), "x")


def test_a_pipe_is_written_to_and_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=30)
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_not_replaced() -> None:
    write_text("/dev/null", "gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_existing_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert existing_file(str(tmp_path / "a"), "mask") == tmp_path / "a"
    with pytest.raises(UserError, match=r"mask not found: .*missing"):
        existing_file(tmp_path / "missing", "mask")
    with pytest.raises(UserError, match="mask is not a file"):
        existing_file(tmp_path, "mask")
    with pytest.raises(UserError, match="mask not found"):
        existing_file("n" * 5000, "mask")


KILLED = """
import os, signal, sys
from pathlib import Path
from ssrctl.io.files import part_folder, whole_file
with whole_file(sys.argv[1]) as temporary, part_folder(Path(sys.argv[1])) as folder:
    temporary.write_text("half")
    (folder / "piece").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    words = [sys.executable, "-c", KILLED, str(target)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        write_text(target, "mine")
        assert len(list(tmp_path.glob(".a.txt.*.part"))) == 2, "the other process still needs them"
    finally:
        process.kill()
        process.communicate()
    write_text(tmp_path / "other.txt", "x")
    assert len(list(tmp_path.glob(".*.part"))) == 2
    write_text(target, "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "other.txt"]


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CannotWrite, match=r"cannot write .*a\.txt: File too large"):
            write_text(tmp_path / "a.txt", "x" * 2000)
        with JsonlLog(tmp_path / "log.jsonl") as log:
            log.append({"text": "x" * 900})
            with pytest.raises(CannotWrite, match=r"cannot write .*log\.jsonl: File too large"):
                log.append({"text": "y" * 900})
            log.append({"z": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row.keys() for _, row in read_jsonl(tmp_path / "log.jsonl")] == [{"text"}, {"z"}], "a torn line is left"
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
