"""The rate limit and the patience: requests leave at a steady rate, and a silent server ends the run.

litellm's own ``rpm`` rejects requests that come too fast instead of delaying them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

MINUTE = 60.0
MAX_PAUSE_S = 300.0  # longer pauses that a server asks for are cut, so that a run does not hang unnoticed


class Pacer:
    """Spaces requests evenly.

    At most ``requests_per_minute`` requests (rounded down, but at least one) leave within any 60 seconds. Up to 60 a
    minute they are exactly evenly spaced. At higher rates a sleep is no longer short compared with the spacing, so
    late requests may catch up in a burst of up to a second's requests (``requests_per_minute / 60``). The spacing is
    then slightly wider, so that the limit holds even with bursts: at 600 a minute, 591 leave in the long run.

    For the tasks of one event loop. Waiting tasks leave in the order of their arrival; a cancelled one takes no turn.

    Args:
        requests_per_minute: above 0; None is no limit.
        clock: monotonic time in seconds.
        sleep: coroutine that waits for a number of seconds.
    """

    def __init__(
        self,
        requests_per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        assert requests_per_minute is None or requests_per_minute > 0
        self._clock, self._sleep = clock, sleep
        self._spacing = self._slack = 0.0
        if requests_per_minute is not None:
            burst = max(1.0, requests_per_minute / MINUTE)
            # n requests span at least (n - 1) * spacing - slack seconds; with slack = (burst - 1) * spacing, one more
            # than the limit spans 60.
            self._spacing = MINUTE / (requests_per_minute - burst + 1)
            self._slack = (burst - 1) * self._spacing
        self._next = clock()  # earliest time of the next request
        self._turn = asyncio.Lock()  # wakes its waiters in order and skips cancelled ones

    async def wait(self) -> None:
        """Wait until the caller's request may leave; it should then leave at once."""
        async with self._turn:
            while (left := self._next - self._clock()) > 0:  # loop: a pause may have begun meanwhile
                await self._sleep(left)
            self._next = max(self._next, self._clock() - self._slack) + self._spacing

    def pause(self, seconds: float) -> None:
        """Hold all requests for ``seconds``, as a server asks with Retry-After; at most ``MAX_PAUSE_S``.

        A current pause is never shortened.
        """
        self._next = max(self._next, self._clock() + min(seconds, MAX_PAUSE_S))


class Silence:
    """The time for which a critic has asked and got no reply, for the tasks of one event loop.

    Only time with a prompt pending counts: a training run that samples for an hour between two batches is not silent.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending = 0
        self._since = self._before = 0.0  # start of the current wait; earlier waits since the last reply

    def __enter__(self) -> None:
        """Note that one more prompt is pending."""
        if self._pending == 0:
            self._since = self._clock()
        self._pending += 1

    def __exit__(self, *exc: object) -> None:
        """Note that a prompt is pending no longer."""
        self._pending -= 1
        if self._pending == 0:
            self._before += self._clock() - self._since

    def end(self) -> None:
        """Note a reply."""
        self._since, self._before = self._clock(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds with a prompt pending since the last reply."""
        return self._before + (self._clock() - self._since if self._pending else 0.0)
