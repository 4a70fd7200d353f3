"""Work that the main process of a job hands out, a piece to each process at a time, and whose results it gets in order."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ssrctl.distributed.world import World
from ssrctl.errors import Failed, Stopped, UserError
from ssrctl.io.interrupts import deferred_interrupt

J = TypeVar("J")
R = TypeVar("R")
T = TypeVar("T")

#: yields the results of all jobs, in the order of the jobs
Spread = Callable[[Iterable[J]], Iterator[R]]

_SENT = (
    UserError,
    Failed,
    Stopped,
    KeyboardInterrupt,
)  # raised by the main process; others end a process where they are


def divide(world: World, work: Callable[[J], Iterable[R]], lead: Callable[[Spread[J, R]], T]) -> T | None:
    """Call ``lead`` in the main process with a function that spreads jobs over all processes, which the others serve.

    Only ``lead`` decides, reads and writes; a job is the same work in any process, so that the results are those of one
    process. With several processes it gives a job to each before it has their results.

    Args:
        world: the processes; every one calls this.
        work: yields the results of a job; an error in it is raised where ``lead`` asks for the result.
        lead: gets the function that yields the results of all jobs in their order. Jobs and results are sent as pickles.

    Returns:
        The result of ``lead`` in the main process; None in the others.

    Raises:
        KeyboardInterrupt: in the main process, when Ctrl-C or SIGTERM came to any of them; jobs are broken off.
    """
    if world.size == 1:
        return lead(lambda jobs: itertools.chain.from_iterable(map(work, jobs)))
    if not world.is_main:
        _serve(world, work)
        return None
    try:
        return lead(lambda jobs: _spread(world, work, jobs))
    finally:
        with deferred_interrupt():
            _hand_out(world, [])


def _hand_out(world: World, jobs: Sequence[J]) -> Sequence[J]:
    """Return the main process's ``jobs`` in all; none are the last."""
    return world.on_main(lambda: jobs)


def _spread(world: World, work: Callable[[J], Iterable[R]], jobs: Iterable[J]) -> Iterator[R]:
    left = iter(jobs)
    while together := list(itertools.islice(left, world.size)):
        with deferred_interrupt() as interrupted:
            _hand_out(world, together)
        mine: list[R] = []
        broken: BaseException | None = None
        try:
            if interrupted():
                raise KeyboardInterrupt
            mine = list(work(together[0]))
        except (Exception, KeyboardInterrupt) as error:  # the others wait for the exchange
            broken = error
        with deferred_interrupt() as interrupted:
            found = world.gather_on_main(mine)
        if broken is not None:
            raise broken
        for outcome in found:
            if isinstance(outcome, _SENT):
                raise outcome
            yield from outcome
        if interrupted():
            signal.raise_signal(signal.SIGINT)  # for whoever handles it outside


def _serve(world: World, work: Callable[[J], Iterable[R]]) -> None:
    """Do this process's part of the jobs until there are no more."""
    nothing: Sequence[J] = []
    with deferred_interrupt() as interrupted:
        while jobs := _hand_out(world, nothing):
            outcome: list[R] | BaseException = []
            try:
                if interrupted():
                    raise KeyboardInterrupt
                with _interruptible():
                    for job in jobs[world.rank :][:1]:
                        outcome = list(work(job))
            except _SENT as error:
                outcome = error
            world.gather_on_main(outcome)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C break off the block inside of ``deferred_interrupt``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
