"""The ledger: a jsonl log of every call of a paid critic, without the texts."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ssrctl.io.jsonl import JsonlLog

ERROR_CLASS = re.compile(r"[a-z][a-z_]{0,39}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to a judge, or one reply taken from the cache. Holds no prompt, no reply and no key.

    In the ledger::

        {"time": "2026-01-31T12:00:00.000+00:00", "id": "q17/3", "step": null, "kind": "judge",
         "model": "openai/gpt-oss-120b", "attempt": 1, "prompt_tokens": 812, "completion_tokens": 96,
         "cost_usd": 0.00018, "latency_s": 1.52, "cached": false, "error": null, "detail": null}

    Attributes:
        id: of the rollout.
        step: index of the step asked about, from 0; None for all steps at once.
        kind: judge, or repair of an unreadable reply.
        model: litellm name of the model that was asked.
        attempt: from 1; retries and fallbacks continue the count.
        prompt_tokens, completion_tokens: as the provider counted them; None if it did not.
        cost_usd: amount charged to the budget: 0 for a cached reply and for a call that was certainly not billed, the
            reserved cost for one that may have been; None when no price is known.
        latency_s: seconds from sending to the end of the reply, without the wait for the rate limit.
        cached: whether the reply came from the cache, without a request.
        error: class of the failure, such as ``timeout``; None when there was a reply.
        detail: the server's words on the first failure of each class, without keys; None for all other calls.
        time: end of the call, ISO 8601 in UTC.
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
    detail: str | None = None
    time: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        # A message may quote the text or the key; ``detail`` is what the client has freed of keys.
        assert self.error is None or ERROR_CLASS.fullmatch(self.error), "an error class, not a message"


class Ledger:
    """Appends calls to a jsonl file; each line reaches the operating system at once.

    A kill loses no line (at most it truncates the one being written); a power cut may lose the last lines. Lines of
    earlier runs stay. May be used from several threads.

    Args:
        path: the file, created with its folder if need be; with None or the null device nothing is written.

    Raises:
        UserError: the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._log: JsonlLog | None = None
        if self.path is not None and str(self.path) != os.devnull:  # which has no fsync
            self._log = JsonlLog(self.path, remedy="free some space, or name another file with --ledger")

    def note(self, call: Call) -> None:
        """Append one line.

        Raises:
            UserError: it cannot be written, on a full disk for instance.
        """
        row = asdict(call)
        with self._lock:
            if self._log is not None:
                self._log.append({"time": row.pop("time")} | row)

    def close(self) -> None:
        """Force the lines onto the disk and close the file; a second call does nothing."""
        with self._lock:
            log, self._log = self._log, None
            if log is not None:
                log.close()
