"""The cache of replies: keys, exactness, other processes, kills, and files that are not what they should be."""

import hashlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.critics.llm import cache as module
from ssrctl.critics.llm.cache import FILE_NAME, Reply, ReplyCache, cache_key, default_cache_dir
from ssrctl.errors import UserError

REPLY = Reply("score: 3", "openai/m", 100, 20, 0.0125)


def reply_of(text):
    return Reply(text, "m", 1, 2, 0.5)


# ------------------------------------------------------------------------------------------------
# keys

PARTS = {
    "critic": "llm",
    "model": "openai/m",
    "api_base": None,
    "prompt_version": 1,
    "sampling": {"temperature": 0.0, "top_p": 1.0},
    "text": "1+1=2",
}


@pytest.mark.parametrize(
    "change",
    [
        {"critic": "other"},
        {"model": "openai/n"},
        {"api_base": "http://localhost:1/v1"},
        {"api_base": "http://localhost:2/v1"},
        {"api_base": ""},
        {"prompt_version": 2},
        {"prompt_version": "1"},
        {"sampling": {"temperature": 0.5, "top_p": 1.0}},
        {"sampling": {"temperature": 0.0}},
        {"text": "1+1=2 "},
        {"text": "1+1=2\ud83d\ude42"},
        {"text": "1+1=2\U0001f642"},
        {"text": "1+1=2é"},
        {"text": "1+1=2e\u0301"},
        {"more": None},
    ],
)
def test_every_part_makes_another_key(change):
    assert cache_key(PARTS | change) != cache_key(PARTS)


def test_no_two_changes_share_a_key():
    texts = ["", "\x00", "a", "\ud83d\ude42", "\U0001f642", "\\ud83d\\ude42", '"', '\\"', "null"]
    keys = {cache_key({"text": text}) for text in texts} | {cache_key({"text": None}), cache_key({"text": [""]})}
    assert len(keys) == len(texts) + 2
    assert cache_key({"a": {"b": 1}, "c": 2}) != cache_key({"a": {"b": 1, "c": 2}})
    assert cache_key({"a": [1, 2]}) != cache_key({"a": [2, 1]})
    assert cache_key({"a": True}) != cache_key({"a": 1})


def test_the_order_of_names_and_the_kind_of_number_do_not_matter():
    turned = {name: PARTS[name] for name in reversed(PARTS)}
    turned["sampling"] = {"top_p": 1, "temperature": 0}
    assert list(turned) != list(PARTS)
    assert cache_key(turned) == cache_key(PARTS)
    assert cache_key({"a": (1, 2)}) == cache_key({"a": [1, 2]})


def test_keys_stay_the_same_from_version_to_version():
    """Else nobody's replies would be found again."""
    canonical = '{"a":["é",null,{"c":false}],"b":1}'
    key = cache_key({"b": 1.0, "a": ["é", None, {"c": False}]})
    assert key == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_key_has_no_place_for_what_is_no_number(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache_key({"temperature": value})


@pytest.mark.parametrize("parts", [{1: "a"}, {"a": {None: 1}}, {"a": [{2: 1}]}, {"a": Path("x")}, {"a": b"x"}])
def test_a_key_is_made_of_json_alone(parts):
    with pytest.raises(TypeError):
        cache_key(parts)


# ------------------------------------------------------------------------------------------------
# one process


def test_what_was_put_is_there_now_and_later(tmp_path):
    with closing(ReplyCache(tmp_path / "deep" / "er")) as cache:
        assert cache.get("k") is None
        cache.put("k", REPLY)
        assert cache.get("k") == REPLY
        assert cache.get("K") is None
    with closing(ReplyCache(tmp_path / "deep" / "er")) as cache:
        assert cache.get("k") == REPLY


def test_what_is_not_known_stays_so(tmp_path):
    reply = Reply("text", "m", None, None, None)
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put("k", reply)
        assert cache.get("k") == reply


def test_the_first_reply_stays(tmp_path):
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put("k", REPLY)
        cache.put("k", REPLY)
        cache.put("k", reply_of("another"))
        assert cache.get("k") == REPLY


@settings(max_examples=25)
@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=()), max_size=9))
def test_texts_come_back_exactly(tmp_path, text, model):
    """Any code points: NUL, lone surrogates, and pairs of them that would make up a character."""
    for exact in (text, text + "\ud83d\ude42\x00" + text):
        key = cache_key({"text": exact, "model": model})
        with closing(ReplyCache(tmp_path)) as cache:
            cache.put(key, Reply(exact, model, 0, 0, 0.0))
            found = cache.get(key)
        assert (found.text, found.model) == (exact, model)


def test_replies_of_10_megabytes(tmp_path):
    reply = reply_of("\u00e9" * 5_000_000)
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put("k", reply)
        assert cache.get("k") == reply


def test_only_the_owner_reads_what_models_wrote(tmp_path):
    before = os.umask(0)
    try:
        with closing(ReplyCache(tmp_path / "new")) as cache:
            cache.put("k", REPLY)
            files = list((tmp_path / "new").iterdir())
            assert {path.name for path in files} >= {FILE_NAME}
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_threads_share_a_cache(tmp_path):
    with closing(ReplyCache(tmp_path)) as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(str(number % 50), reply_of(f"{number % 50}")), range(400)))
        found = list(pool.map(lambda number: cache.get(str(number)).text, range(50)))
    assert found == [str(number) for number in range(50)]


def test_closing_twice_is_fine(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.close()
    cache.close()


def test_the_default_folder(monkeypatch, tmp_path):
    for name in ("SSRCTL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ssrctl" / "critic"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == tmp_path / ".cache" / "ssrctl" / "critic"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "ssrctl" / "critic"
    monkeypatch.setenv("SSRCTL_CACHE", "~/own")
    assert default_cache_dir() == tmp_path / "own" / "critic"


def test_without_a_home_the_remedy_is_an_option(monkeypatch):
    for name in ("SSRCTL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="--critic-cache-dir"):
        default_cache_dir()


# ------------------------------------------------------------------------------------------------
# several processes

WORKER = """
import random, sys
from contextlib import closing
from ssrctl.critics.llm.cache import Reply, ReplyCache

folder, name = sys.argv[1], sys.argv[2]
keys = [str(number) for number in range(100)]
random.Random(name).shuffle(keys)
sys.stdin.readline()  # all begin at once
for _ in range(2):
    with closing(ReplyCache(folder)) as cache:
        for key in keys:
            if cache.get(key) is None:
                cache.put(key, Reply(key * 500, name, int(key), 0, 0.5))
            found = cache.get(key)
            assert found is not None and found.text == key * 500 and found.prompt_tokens == int(key), (key, found)
"""


def test_processes_share_a_file_from_its_making_on(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "new"), str(number)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    with closing(ReplyCache(tmp_path / "new")) as cache:
        found = [cache.get(str(number)) for number in range(100)]
    assert [reply.text for reply in found] == [str(number) * 500 for number in range(100)]


PUT_FOR_EVER = """
import itertools, sys
from contextlib import closing
from ssrctl.critics.llm.cache import Reply, ReplyCache

folder, first = sys.argv[1], int(sys.argv[2])
with closing(ReplyCache(folder)) as cache:
    for number in itertools.count(first):
        cache.put(str(number), Reply(f"{number} " * 30_000, "m", number, 0, 0.5))
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
"""


def test_a_kill_leaves_all_that_was_put_and_a_sound_file(tmp_path):
    chance, put = random.Random(0), 0
    for _ in range(3):
        command = [sys.executable, "-c", PUT_FOR_EVER, str(tmp_path), str(put)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for _ in range(chance.randint(1, 40)):
                process.stdout.readline()
                put += 1
            process.send_signal(signal.SIGKILL)
            put += len(process.stdout.read().split())
        with closing(ReplyCache(tmp_path)) as cache:
            assert cache._run("PRAGMA integrity_check") == [("ok",)]
            for number in range(put):
                assert cache.get(str(number)) == Reply(f"{number} " * 30_000, "m", number, 0, 0.5)
            put += cache.get(str(put)) is not None  # one that was put and not told


def test_one_waits_while_another_process_writes(tmp_path):
    with closing(ReplyCache(tmp_path)) as cache:
        other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        timer.start()
        cache.put("k", REPLY)
        timer.join()
        other.close()
        assert cache.get("k") == REPLY


def test_a_file_that_is_held_for_too_long_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
    with closing(ReplyCache(tmp_path)) as cache:
        other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match=r"another process has locked") as caught:
            cache.put("k", REPLY)
        assert "--no-critic-cache" in caught.value.remedy
        with pytest.raises(UserError, match=r"another process has locked"):
            ReplyCache(tmp_path)
        other.close()
        cache.put("k", REPLY)
        assert cache.get("k") == REPLY


# ------------------------------------------------------------------------------------------------
# files that are not what they should be


def check_refusal(folder, says):
    """Opening says what is wrong, names the file and a way out, and leaves the file as it was."""
    path = folder / FILE_NAME
    before = path.read_bytes()
    with pytest.raises(UserError, match=says) as caught:
        ReplyCache(folder)
    assert str(path) in caught.value.message
    assert "--no-critic-cache" in caught.value.remedy
    assert path.read_bytes() == before


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"not a database, " * 1000)
    check_refusal(tmp_path, "corrupt")


def test_an_empty_file_becomes_a_cache(tmp_path):
    (tmp_path / FILE_NAME).touch()
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put("k", REPLY)
        assert cache.get("k") == REPLY


def filled(folder):
    with closing(ReplyCache(folder)) as cache:
        for number in range(300):
            cache.put(str(number), reply_of(f"{number} " * 200))
    return folder / FILE_NAME


@pytest.mark.parametrize("keep", [60, 2048, 4096, 20_000, 100_000])
def test_a_file_that_was_cut_off(tmp_path, keep):
    """Whatever is found is right; the rest is an error, at opening or later."""
    path = filled(tmp_path)
    os.truncate(path, keep)
    found = 0
    with pytest.raises(UserError, match=FILE_NAME) as caught, ReplyCache(tmp_path) as cache:
        for number in range(300):
            reply = cache.get(str(number))
            assert reply == reply_of(f"{number} " * 200)
            found += 1
    assert found < 300
    assert "--no-critic-cache" in caught.value.remedy


def test_bytes_that_are_no_text(tmp_path):
    filled(tmp_path)
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    with connection:
        connection.execute("UPDATE replies SET text = x'ff' WHERE key = '7'")
    connection.close()
    with closing(ReplyCache(tmp_path)) as cache, pytest.raises(UserError, match="corrupt"):
        cache.get("7")


def test_a_database_of_another_program(tmp_path):
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("CREATE TABLE replies (key TEXT)")
    connection.close()
    check_refusal(tmp_path, "another program")


def test_a_file_of_a_newer_version(tmp_path):
    connection = sqlite3.connect(filled(tmp_path))
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    check_refusal(tmp_path, "version 2")


def test_a_file_whose_table_is_gone(tmp_path):
    connection = sqlite3.connect(filled(tmp_path))
    connection.execute("DROP TABLE replies")
    connection.close()
    with closing(ReplyCache(tmp_path)) as cache, pytest.raises(UserError, match="corrupt: no such table"):
        cache.get("k")


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / FILE_NAME).mkdir(parents=True)
    folders = [tmp_path / "file" / "cache", tmp_path / "file", tmp_path / "taken", tmp_path / ("x" * 300)]
    if sys.platform == "linux":
        folders.append(Path("/proc/ssrctl"))
    for folder in folders:
        with pytest.raises(UserError, match="cannot keep the critic's replies") as caught:
            ReplyCache(folder)
        assert str(folder) in caught.value.message
        assert "--critic-cache-dir" in caught.value.remedy


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_is_read_only(tmp_path):
    filled(tmp_path)
    (tmp_path / FILE_NAME).chmod(0o400)
    with pytest.raises(UserError, match="cannot keep the critic's replies"):
        ReplyCache(tmp_path)


@pytest.mark.parametrize(
    ("pragma", "says"), [("max_page_count = 8", "full"), ("query_only = ON", "readonly")], ids=["full", "read-only"]
)
def test_a_full_or_read_only_disk_is_one_clear_error_and_loses_nothing(tmp_path, pragma, says):
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put("k", REPLY)
        cache._connection.execute(f"PRAGMA {pragma}")
        with pytest.raises(UserError, match=f"cannot keep the critic's replies.*{says}") as caught:
            for number in range(100):
                cache.put(str(number), reply_of("x" * 10_000))
        assert "--no-critic-cache" in caught.value.remedy
        assert cache.get("k") == REPLY
