"""The ledger: one line of jsonl for every call of a paid critic, without the texts."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ssrctl.errors import UserError
from ssrctl.io.jsonl import JsonlLog

ERROR_CLASS = re.compile(r"[a-z][a-z_]{0,39}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to a judge, or one reply taken from the cache. Holds no text of either side, and no key.

    In the ledger::

        {"time": "2026-01-31T12:00:00.000+00:00", "id": "q17/3", "step": null, "kind": "judge",
         "model": "openai/gpt-oss-120b", "attempt": 1, "prompt_tokens": 812, "completion_tokens": 96,
         "cost_usd": 0.00018, "latency_s": 1.52, "cached": false, "error": null}

    Attributes:
        id: of the rollout.
        step: index of the step asked about, from 0; None for all steps at once.
        kind: judge, or repair of a reply that could not be read.
        model: litellm name of the model that was asked.
        attempt: from 1; retries and fallbacks count on.
        prompt_tokens, completion_tokens: as the provider counted them; None if it told nothing.
        cost_usd: what was put to the budget's account: 0 for a reply from the cache and for a call that was certainly
            not billed, the reserved cost for one that may have been; None when no price is known.
        latency_s: seconds from sending to the end of the reply, waiting for a turn excluded.
        cached: whether the reply came from the cache; nothing was sent then.
        error: class of the failure, such as ``timeout``; None when there was a reply.
        time: when the call ended, ISO 8601 in UTC.
    """

    id: str
    step: int | None
    kind: Literal["judge", "repair"]
    model: str
    attempt: int = 1
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    latency_s: float | None = None
    cached: bool = False
    error: str | None = None
    time: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        # A message may quote the text or the key; only the class of a failure is written down.
        assert self.error is None or ERROR_CLASS.fullmatch(self.error), "an error class, not a message"


class Ledger:
    """Appends calls to a jsonl file; each line reaches the operating system as it is noted.

    A kill loses nothing that was noted (at most it tears the line being written); a power cut may lose the last
    lines. Lines of earlier runs stay. May be used from several threads.

    Args:
        path: the file, made with its folder if need be; None and the null device note nothing.

    Raises:
        UserError: the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._log: JsonlLog | None = None
        if self.path is not None and str(self.path) != os.devnull:  # which cannot be forced onto a disk
            try:
                self._log = JsonlLog(self.path)
            except OSError as error:
                raise self._unwritable(error) from error

    def note(self, call: Call) -> None:
        """Add one line.

        Raises:
            UserError: it cannot be written, on a full disk for instance.
        """
        with self._lock:
            if self._log is None:
                return
            row = asdict(call)
            try:
                self._log.append({"time": row.pop("time")} | row)
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Force the lines onto the disk and close the file; a second time does nothing."""
        with self._lock:
            log, self._log = self._log, None
            if log is None:
                return
            try:
                log.close()
            except OSError as error:
                raise self._unwritable(error) from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the ledger {self.path}: {error.strerror}", "make room, or name another file with --ledger"
        )
