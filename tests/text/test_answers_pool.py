"""The processes that do algebra: what they survive, and that none is left behind."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from ssrctl.text import answer_pool, answer_worker
from ssrctl.text.answer_pool import Undecided, same_by_algebra
from ssrctl.text.answers import check_answer

pytest.importorskip("math_verify")

BOMB = "9^{9^{9^9}}"
PATIENCE = 120.0  # seconds to wait for what should take none, on a busy machine


@pytest.fixture
def pool():
    """A pool of its own for a test."""
    fresh = answer_pool._Pool()
    yield fresh
    fresh.close()


@pytest.fixture(scope="module")
def shared():
    """A pool for tests that leave its one process alive."""
    fresh = answer_pool._Pool()
    fresh.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE)
    yield fresh
    assert len(fresh._idle) == 1
    fresh.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:  # noqa: PTH123
            return stream.read().rsplit(b")", 1)[1].split()[0] != b"Z"
    except OSError:
        return False


def test_a_process_that_takes_too_long_is_killed_and_replaced(pool):
    assert pool.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE) is True
    worker = pool._idle[0]
    with pytest.raises(Undecided, match=r"no verdict within 0\.2 s"):
        pool.compare(BOMB, "\\pi", 0.2)
    assert worker.process.returncode == -signal.SIGKILL and not pool._idle and not pool._busy
    assert pool.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE) is True
    assert pool._idle[0] is not worker


def test_one_process_serves_many_comparisons(shared):
    worker = shared._idle[0]
    before = worker.num_comparisons
    for number in range(2, 7):
        assert shared.compare(f"2\\sqrt{{{number}}}", f"\\sqrt{{{4 * number}}}", PATIENCE) is True
    assert shared._idle == [worker] and worker.num_comparisons == before + 5


def test_a_process_that_dies_at_work_gives_no_verdict(pool):
    seen = []

    def compare() -> None:
        with pytest.raises(Undecided, match="exit code -9"):
            pool.compare(BOMB, "\\pi", PATIENCE)
        seen.append("undecided")

    thread = threading.Thread(target=compare)
    thread.start()
    wait_for(lambda: pool._busy)
    next(iter(pool._busy)).process.kill()
    thread.join()
    assert seen == ["undecided"]


def test_one_that_died_idle_is_replaced_unseen(pool):
    pool.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE)
    pool._idle[0].process.kill()
    assert pool.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE) is True


@pytest.mark.slow
def test_old_processes_are_replaced(pool, monkeypatch):
    monkeypatch.setattr(answer_pool, "COMPARISONS_PER_WORKER", 2)
    for _ in range(2):
        pool.compare("2\\sqrt{3}", "\\sqrt{12}", PATIENCE)
    assert pool._idle == []


@pytest.mark.slow
def test_no_more_processes_than_allowed(pool):
    threads = [threading.Thread(target=lambda: pool.compare("x+1", "1+x", PATIENCE)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(pool._idle) <= answer_pool.MAX_WORKERS
    assert sum(worker.num_comparisons for worker in pool._idle) == 12


def test_one_whose_parent_is_gone_ends_by_itself():
    worker = answer_pool._Worker()
    job = {"extracted": BOMB, "reference": "5", "seconds": 0.2}
    worker.process.stdin.write((json.dumps(job) + "\n").encode())
    assert worker.process.wait(PATIENCE) == -signal.SIGALRM
    worker.kill()


@pytest.mark.slow
def test_that_end_does_not_come_after_the_verdict():
    worker = answer_pool._Worker()
    job = {"extracted": "2^{10}", "reference": "1024", "seconds": 5.0}
    worker.process.stdin.write((json.dumps(job) + "\n").encode())
    assert worker._receive(PATIENCE) == {"same": True}
    time.sleep(5.5)
    assert worker.process.poll() is None
    worker.kill()


def test_interrupts_of_the_terminal_do_not_reach_them(shared):
    worker = shared._idle[0]
    worker.process.send_signal(signal.SIGINT)
    assert shared.compare("3\\sqrt{3}", "\\sqrt{27}", PATIENCE) is True and shared._idle[0] is worker


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads limits of another process")
def test_their_memory_is_limited(shared):
    import resource

    soft, _ = resource.prlimit(shared._idle[0].process.pid, resource.RLIMIT_AS)
    assert soft == answer_worker.MEMORY_LIMIT_BYTES


def test_verdicts_are_kept_but_not_failures(pool, monkeypatch):
    asked = []

    def compare(extracted: str, reference: str, timeout: float) -> bool:
        asked.append(extracted)
        if extracted == BOMB:
            raise Undecided("too long")
        return True

    monkeypatch.setattr(pool, "compare", compare)
    monkeypatch.setattr(answer_pool, "_pool", pool)
    same_by_algebra.cache_clear()
    for _ in range(2):
        assert same_by_algebra("2\\sqrt{3}", "\\sqrt{12}") is True
        with pytest.raises(Undecided):
            same_by_algebra(BOMB, "\\pi")
    assert asked == ["2\\sqrt{3}", BOMB, BOMB]
    same_by_algebra.cache_clear()


def script(code: str, tmp_path, **options) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(code)
    return subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, **options)


def test_a_script_without_a_main_guard_is_not_run_twice(tmp_path):
    # A file that is called like a library must not be taken for it, either.
    (tmp_path / "sympy.py").write_text("raise RuntimeError('the wrong sympy')")
    code = """
import sys
sys.path.remove(sys.path[0])
sys.stdout.write("run\\n"); sys.stdout.flush()
from ssrctl.text.answers import check_answer
sys.stdout.write(f"{check_answer(chr(92) + 'boxed{' + chr(92) + 'sqrt{12}}', '2' + chr(92) + 'sqrt{3}').outcome}\\n")
heavy = [name for name in ("torch", "math_verify", "sympy", "multiprocessing") if name in sys.modules]
sys.stdout.write(f"{heavy}\\n")
"""
    out, _ = script(code, tmp_path).communicate(timeout=PATIENCE)
    assert out.splitlines() == ["run", "correct", "[]"]


def test_the_worker_loads_no_torch():
    code = (
        "import sys\nfrom ssrctl.text.answer_worker import _comparison\n"
        "assert _comparison()('2^{10}', '1024')\n"
        "sys.stdout.write(' '.join(m for m in ('torch', 'numpy', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_none_outlives_a_killed_parent(tmp_path):
    code = f"""
import json, os, signal, sys
from ssrctl.text import answer_pool
idle, busy = answer_pool._Worker(), answer_pool._Worker()
job = {{"extracted": {BOMB!r}, "reference": "5", "seconds": 1.5}}
busy.process.stdin.write((json.dumps(job) + "\\n").encode())
sys.stdout.write(f"{{idle.process.pid}} {{busy.process.pid}}\\n"); sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    out, _ = script(code, tmp_path).communicate(timeout=PATIENCE)
    for pid in map(int, out.split()):
        wait_for(lambda pid=pid: not alive(pid))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_leaves_none_behind(tmp_path):
    code = f"""
import sys, threading, time
from ssrctl.text import answer_pool
from ssrctl.text.answers import check_answers
def tell():
    while not answer_pool._pool._busy:
        time.sleep(0.01)
    sys.stdout.write(f"{{next(iter(answer_pool._pool._busy)).process.pid}}\\n"); sys.stdout.flush()
threading.Thread(target=tell).start()
check_answers([("\\\\\\\\boxed{{{BOMB}}}", "5")] * 3, timeout=0.5)
"""
    process = script(code, tmp_path, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    wait_for(lambda: not alive(pid))


def test_a_fork_has_processes_of_its_own(tmp_path):
    code = """
import os, sys
from ssrctl.text.answer_equality import compare_answers
from ssrctl.text import answer_pool
assert compare_answers("\\\\sqrt{12}", "2\\\\sqrt{3}")
mine = answer_pool._pool._idle[0].process.pid
child = os.fork()
if child == 0:
    ok = compare_answers("\\\\sqrt{27}", "3\\\\sqrt{3}") and answer_pool._pool._idle[0].process.pid != mine
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert status == 0 and compare_answers("\\\\sqrt{48}", "4\\\\sqrt{3}") and answer_pool._pool._idle[0].process.pid == mine
sys.stdout.write("fine")
"""
    out, _ = script(code, tmp_path).communicate(timeout=PATIENCE)
    assert out == "fine"


HOSTILE = {
    "power tower": BOMB,
    "open brackets": "(" * 1500 + "x",
    "nested brackets": "(" * 900 + "x" + ")" * 900,
    "factorials": "10!!!!!!",
    "a large factorial": "99999999999999!",
    "nested fractions": "\\frac{" * 300 + "1" + "}{2}" * 300,
    "nested powers": "x^{" * 300 + "}" * 300,
    "a huge matrix": "\\begin{pmatrix}" + "\\\\".join(["&".join("x" * 30)] * 30) + "\\end{pmatrix}",
    "an integral": "\\int_0^1 e^{x^2}\\sin(x^3) dx",
    "a long sum": "\\sum_{n=1}^{10^9} n^{-3}",
    "a high power": "(x+y+z)^{1000}",
    "a binomial": "\\binom{10^9}{5\\cdot 10^8}",
    "not LaTeX": "\\\x00\ud800{",
}


@pytest.mark.parametrize("name", ["open brackets", "not LaTeX"])
def test_hostile_answers_have_an_outcome(name):
    assert check_answer(f"\\boxed{{{HOSTILE[name]}}}", "\\pi", timeout=0.5).outcome in (
        "wrong",
        "timed_out",
        "unparsed",
    )


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["5", "\\pi", "x^2+1", "(1,2)"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_have_an_outcome_whatever_is_asked(name, reference):
    final = check_answer(f"\\boxed{{{HOSTILE[name]}}}", reference, timeout=1.0)
    assert final.outcome in ("wrong", "timed_out", "unparsed")
    # and as the reference
    assert check_answer("\\boxed{x^2+2}", HOSTILE[name], timeout=1.0).outcome in ("wrong", "timed_out")
