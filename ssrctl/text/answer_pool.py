"""Symbolic comparison of answers in processes that can be killed.

Algebra on model-written text may take unlimited time or memory (``9^{9^{9^9}}``), and math-verify's own timeouts
are signals, which work only in the main thread. So comparisons run in a few long-lived processes, each a fresh
Python (not a fork: the parent may have threads and a GPU) that imports math-verify and nothing of torch. They
start when first needed. A worker that exceeds its timeout is killed and replaced. When the parent ends, even by
SIGKILL, the workers' input ends and they exit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from typing import Any

from ssrctl.errors import UserError

ANSWER_TIMEOUT = 5.0  # seconds for one comparison; usual ones take 0.01 to 0.1
START_TIMEOUT = 120.0  # seconds for a process to import math-verify, which takes 0.4 on an idle machine
MAX_WORKERS = max(1, min(4, os.cpu_count() or 1))
# A process is replaced after this many comparisons, since the caches of symbolic algebra grow.
COMPARISONS_PER_WORKER = 1000


class Undecided(Exception):
    """A comparison without a verdict: it timed out, or its process died (usually out of memory)."""


class _WorkerGone(Exception):
    """The worker process has ended."""


@functools.lru_cache(maxsize=4096)
def same_by_algebra(extracted: str, reference: str, timeout: float = ANSWER_TIMEOUT) -> bool:
    """Return True if math-verify finds two answers equal. Safe to call from any thread.

    Args:
        extracted: the answer found in a response, LaTeX without delimiters or plain.
        reference: the correct answer.
        timeout: seconds; waiting for a free process does not count.

    Raises:
        Undecided: no verdict within ``timeout``.
        UserError: math-verify is not installed, or no process could be started.
    """
    # Exceptions are not cached: a comparison that failed on a busy machine is retried.
    return _pool.compare(extracted, reference, timeout)


class _Worker:
    """A process and its pipes; used by one thread at a time."""

    def __init__(self) -> None:
        self.num_comparisons = 0
        # The import path of this process without the current folder, whose files may shadow a library.
        # Fixed hashing, so that the order of symbols, and with it a verdict, never differs between runs.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ssrctl.text.answer_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        try:
            greeting = self._receive(START_TIMEOUT)
        except (Undecided, _WorkerGone) as error:
            self.kill()
            raise UserError(
                f"the process that compares answers did not start (exit code {self.process.returncode})",
                "run `python -m ssrctl.text.answer_worker` to see why",
            ) from error
        except BaseException:
            self.kill()
            raise
        if "error" in greeting:
            self.kill()
            raise UserError(f"math-verify cannot be imported: {greeting['error']}", "pip install 'ssrctl[math]'")

    def compare(self, extracted: str, reference: str, timeout: float) -> bool:
        self.num_comparisons += 1
        job = {"extracted": extracted, "reference": reference, "seconds": 2 * timeout + 1}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(job) + "\n").encode("ascii"))
        except BrokenPipeError as error:
            raise _WorkerGone from error
        return bool(self._receive(timeout)["same"])

    def _receive(self, timeout: float) -> dict[str, Any]:
        """Read the next line of the process, which is shorter than a pipe's atomic write."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise Undecided(f"no verdict within {timeout:g} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise _WorkerGone
        message: dict[str, Any] = json.loads(line)
        return message

    def kill(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.wait()


class _Pool:
    """Up to ``MAX_WORKERS`` processes, started as concurrent comparisons need them."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    def compare(self, extracted: str, reference: str, timeout: float) -> bool:
        _require_math_verify()
        with self._slots:
            if (worker := self._take_idle()) is not None:
                with contextlib.suppress(_WorkerGone):  # it died while idle: ask a new one
                    return self._ask(worker, extracted, reference, timeout)
            worker = _Worker()
            try:
                return self._ask(worker, extracted, reference, timeout)
            except _WorkerGone:
                raise Undecided(f"the process ended (exit code {worker.process.returncode})") from None

    def _take_idle(self) -> _Worker | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _ask(self, worker: _Worker, extracted: str, reference: str, timeout: float) -> bool:
        self._busy.add(worker)
        try:
            verdict = worker.compare(extracted, reference, timeout)
        except BaseException:  # timeout, gone, or Ctrl-C: a late reply would be taken for the next comparison's
            worker.kill()
            raise
        finally:
            self._busy.discard(worker)
        if worker.num_comparisons < COMPARISONS_PER_WORKER:
            self._idle.append(worker)
        else:
            worker.kill()
        return verdict

    def close(self) -> None:
        """Kill all processes."""
        for worker in [*self._idle, *self._busy]:
            worker.process.kill()


_pool = _Pool()


def _forget_workers() -> None:
    """Start with an empty pool in a fork: the workers belong to the parent."""
    global _pool
    _pool = _Pool()


atexit.register(lambda: _pool.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("comparing answers that are not plain numbers needs math-verify", "pip install 'ssrctl[math]'")
    if os.name != "posix":
        raise UserError("comparing answers that are not plain numbers needs Linux or macOS", "use WSL on Windows")
