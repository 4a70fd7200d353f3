"""The ledger: what a line holds and does not hold, and that lines survive."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime

import pytest

from ssrctl.critics.llm.ledger import Call, Ledger
from ssrctl.errors import UserError
from ssrctl.io.jsonl import read_jsonl


def rows(path):
    return [row for _, row in read_jsonl(path)]


def test_a_line_holds_the_call_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    before = datetime.now(UTC)
    with closing(Ledger(path)) as ledger:
        ledger.note(
            Call(
                id="q17/3",
                step=2,
                kind="repair",
                model="openai/m",
                attempt=3,
                prompt_tokens=812,
                completion_tokens=96,
                cost_usd=0.00018,
                latency_s=1.5,
                error="timeout",
            )
        )
    (row,) = rows(path)
    assert next(iter(row)) == "time"
    assert before.timestamp() - 0.001 <= datetime.fromisoformat(row.pop("time")).timestamp()
    assert row == {
        "id": "q17/3",
        "step": 2,
        "kind": "repair",
        "model": "openai/m",
        "attempt": 3,
        "prompt_tokens": 812,
        "completion_tokens": 96,
        "cost_usd": 0.00018,
        "latency_s": 1.5,
        "cached": False,
        "error": "timeout",
        "detail": None,
    }


def test_there_is_no_field_for_texts_or_keys():
    counts = {"attempt", "prompt_tokens", "completion_tokens", "cost_usd", "latency_s"}
    names = {field.name for field in dataclasses.fields(Call)}
    assert names == {"time", "id", "step", "kind", "model", "cached", "error", "detail"} | counts


@pytest.mark.parametrize("message", ["Incorrect API key: sk-1", "a" * 41, "", "Timeout"])
def test_an_error_is_a_class_and_never_a_message(message):
    with pytest.raises(AssertionError, match="class"):
        Call(id="1", step=None, kind="judge", model="m", error=message)


def test_lines_of_earlier_runs_stay_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for number in range(2):
        with closing(Ledger(path)) as ledger:
            ledger.note(Call(id=str(number), step=None, kind="judge", model="m"))
        with path.open("ab") as stream:
            stream.write(b'{"time": "20')
    with closing(Ledger(path)):
        pass
    assert [row["id"] for row in rows(path)] == ["0", "1"]


def test_ids_may_be_any_text(tmp_path):
    odd = ["", "a\nb", "\ud800", "\x00", "🙂" * 1000]
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        for text in odd:
            ledger.note(Call(id=text, step=None, kind="judge", model="m"))
    assert [row["id"] for row in rows(tmp_path / "ledger.jsonl")] == odd


def test_threads_do_not_mix_their_lines(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def work(name):
        for number in range(200):
            ledger.note(Call(id=f"{name}/{number}" + "x" * 500, step=None, kind="judge", model="m"))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    assert len({row["id"] for row in rows(tmp_path / "ledger.jsonl")}) == 800


def test_no_path_notes_nothing_and_closing_twice_is_fine(tmp_path):
    for ledger in (Ledger(None), Ledger(tmp_path / "ledger.jsonl")):
        ledger.note(Call(id="1", step=None, kind="judge", model="m"))
        ledger.close()
        ledger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(UserError, match="--ledger") as caught:
            Ledger(path)
        assert str(path) in caught.value.message


def test_a_full_disk_is_one_clear_error():
    ledger = Ledger("/dev/full") if sys.platform == "linux" else pytest.skip("has no /dev/full")
    with pytest.raises(UserError, match="No space left"):
        ledger.note(Call(id="1", step=None, kind="judge", model="m"))


NOTE_FOR_EVER = """
import itertools, sys
from ssrctl.critics.llm.ledger import Call, Ledger
ledger = Ledger(sys.argv[1])
for number in itertools.count():
    ledger.note(Call(id=str(number), step=None, kind="judge", model="m"))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_kill_loses_nothing_that_was_noted(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with subprocess.Popen([sys.executable, "-c", NOTE_FOR_EVER, str(path)], stdout=subprocess.PIPE) as process:
        for _ in range(500):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = 500 + len(process.stdout.read().split())
    with closing(Ledger(path)):
        pass
    found = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert found[:told] == [str(number) for number in range(told)]
    assert len(found) <= told + 1
