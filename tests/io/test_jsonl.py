"""jsonl: whole files, stdin and stdout, and logs that survive a kill."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.errors import UserError
from ssrctl.io.jsonl import JsonlLog, dump_line, read_jsonl, write_jsonl

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
rows = st.dictionaries(st.text(), values, max_size=4)


class Fed:
    """A stdin that holds some bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@given(st.lists(rows, min_size=1, max_size=5))
def test_there_and_back(tmp_path: Path, written: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, written) == len(written)
    assert [row for _, row in read_jsonl(path)] == written
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.path.write_bytes(b"")
        for row in written:
            log.append(row)
    assert (tmp_path / "log.jsonl").read_bytes() == path.read_bytes()


def test_lines_are_counted_over_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [
        (f"{tmp_path}/a.jsonl:1", {"a": 1}),
        (f"{tmp_path}/a.jsonl:4", {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid json"),
        (b"[1, 2]", "expected a json object, found list"),
        (b"3", "expected a json object, found int"),
        (b'{"a": NaN}', "NaN is not a json number"),
        (b'{"a": -Infinity}', "-Infinity is not a json number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"b": {"a": 1, "a": 1}}', "not valid json: the key 'a' occurs twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not valid json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid json"),
    ],
    ids=range(10),
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(UserError, match=message) as caught:
        list(read_jsonl(path, on_torn=lambda message: None))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="no records"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="not found"):
        list(read_jsonl(tmp_path / "b.jsonl"))


def test_a_torn_tail_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "ü'.encode()[:-1])
    told: list[str] = []
    assert [row for _, row in read_jsonl(path, on_torn=told.append)] == [{"a": 1}]
    assert len(told) == 1 and told[0].startswith(f"{path}:2: ")
    with pytest.raises(UserError, match=r":2: not UTF-8"):
        list(read_jsonl(path))
    path.write_bytes(b'{"a"')
    with pytest.raises(UserError, match="no records in it: its only line is truncated"):
        list(read_jsonl(path, on_torn=told.append))
    path.write_bytes(b'{"a": 1}\n{"a": 1, "a": 2}')  # whole, though its newline is missing
    with pytest.raises(UserError, match=r":2: not valid json: the key 'a' occurs twice"):
        list(read_jsonl(path, on_torn=told.append))


def test_a_last_line_that_lacks_its_newline_alone_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}')
    told: list[str] = []
    assert len(list(read_jsonl(tmp_path / "a.jsonl", on_torn=told.append))) == 2
    assert told == []


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_log_goes_on_after_a_kill_at_any_byte(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    lines = [dump_line({"n": 0, "text": "ä" * 3}), dump_line({"n": 1, "text": "\U0001f600"})]
    data = "".join(lines).encode()
    whole = [json.loads(line) for line in lines]
    path.write_bytes(data[:-cut])
    # what lacks only its newline counts as written
    kept = sum(data[:-cut].startswith("".join(lines[: n + 1]).encode()[:-1]) for n in range(2))
    with JsonlLog(path) as log:
        log.append({"n": 2})
    assert [row for _, row in read_jsonl(path)] == [*whole[:kept], {"n": 2}]


def test_a_long_torn_tail_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 0}\n{"text": "' + b"x" * 200_000)
    with JsonlLog(path) as log:
        log.append({"n": 1})
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n'


def test_a_log_is_readable_while_it_is_open(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "sub" / "log.jsonl") as log:
        log.append({"n": 0})
        assert [row for _, row in read_jsonl(log.path)] == [{"n": 0}]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    assert path.read_text() == '{"a": 1}\n', "a failed write must keep the old file"


def test_lone_surrogates_survive(tmp_path: Path) -> None:
    row = {"a": "\ud800 and ü"}
    write_jsonl(tmp_path / "a.jsonl", [row])
    assert [r for _, r in read_jsonl(tmp_path / "a.jsonl")] == [row]
    assert "ü" in dump_line({"a": "ü"})


def test_stdin_and_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Fed('{"a": "ü"}\n{"a": 2}\n'.encode()))
    found = list(read_jsonl("-"))
    assert found == [("<stdin>:1", {"a": "ü"}), ("<stdin>:2", {"a": 2})]
    assert write_jsonl("-", (row for _, row in found)) == 2
    assert capsys.readouterr().out == '{"a": "ü"}\n{"a": 2}\n'
    monkeypatch.setattr(sys, "stdin", Fed(b"nonsense\n"))
    with pytest.raises(UserError, match="<stdin>:1: not valid json"):
        list(read_jsonl("-"))
