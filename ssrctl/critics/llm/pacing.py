"""Pacing: requests leave at a steady rate, in the order in which they were asked for.

litellm's own ``rpm`` refuses what comes too fast instead of holding it back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

MINUTE = 60.0
MAX_PAUSE_S = 300.0  # a server that asks for more is asked again after this long, lest a run stand still unseen


class Pacer:
    """Spaces requests evenly.

    At most ``requests_per_minute`` requests (rounded down, but at least one) leave within any 60 seconds. Up to 60 a
    minute they are exactly evenly spaced. At higher rates, where a sleep is no longer short beside the spacing, what
    was late may be made up for by up to a second's worth of requests at once (``requests_per_minute / 60``), and the
    spacing is so much closer to the limit's that even then the limit holds: at 600 a minute, 591 leave in the long
    run.

    For the tasks of one event loop. Waiting tasks go in the order in which they came, and one that is cancelled
    takes no turn.

    Args:
        requests_per_minute: above 0; None is no limit.
        clock: seconds from any origin, never going back.
        sleep: waits so many seconds.
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
        self._next = clock()  # when the next request may leave, were it to come in time
        self._turn = asyncio.Lock()  # wakes its waiters in order, and passes over those that were cancelled

    async def wait(self) -> None:
        """Return when the caller's request may leave; it should then leave at once."""
        async with self._turn:
            while (left := self._next - self._clock()) > 0:  # again: a pause may have begun meanwhile
                await self._sleep(left)
            self._next = max(self._next, self._clock() - self._slack) + self._spacing

    def pause(self, seconds: float) -> None:
        """Let nothing leave for so many seconds, as a server asks with Retry-After; at most ``MAX_PAUSE_S``. A pause
        under way is never shortened."""
        self._next = max(self._next, self._clock() + min(seconds, MAX_PAUSE_S))
