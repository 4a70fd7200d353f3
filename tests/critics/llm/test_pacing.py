"""The pacer, in virtual time."""

import asyncio
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import now, run_virtually

from ssrctl.critics.llm.pacing import MAX_PAUSE_S, Pacer

EPSILON = 1e-6  # timers may fire this much early: the loop's clock resolution


def make(requests_per_minute):
    return Pacer(requests_per_minute, clock=asyncio.get_running_loop().time)


async def leave_all(pacer, arrivals):
    """When each request leaves, by when it came; in the order of leaving, with its number."""
    left = []

    async def one(number, arrival):
        await asyncio.sleep(arrival)
        await pacer.wait()
        left.append((now(), number))

    await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(arrivals)))
    return left


def test_sixty_a_minute_leave_a_second_apart_from_the_first_on():
    async def main():
        return await leave_all(make(60), [0.0] * 5)

    assert [time for time, _ in run_virtually(main())] == pytest.approx([0, 1, 2, 3, 4], abs=EPSILON)


def test_slower_than_one_a_minute():
    async def main():
        return await leave_all(make(0.5), [0.0] * 3)

    assert [time for time, _ in run_virtually(main())] == pytest.approx([0, 120, 240], abs=EPSILON)


def test_no_turn_is_saved_up_at_slow_rates():
    async def main():
        return await leave_all(make(30), [0.0, 100.0, 100.0, 100.0])

    assert [time for time, _ in run_virtually(main())] == pytest.approx([0, 100, 102, 104], abs=EPSILON)


def test_a_second_of_turns_is_saved_up_at_fast_rates():
    async def main():
        return await leave_all(make(600), [100.0] * 12)

    times = [time for time, _ in run_virtually(main())]
    assert times[:10] == pytest.approx([100.0] * 10, abs=EPSILON)
    assert times[10:] == pytest.approx([100 + 60 / 591, 100 + 120 / 591], abs=EPSILON)


@settings(max_examples=30)
@given(
    st.sampled_from([0.7, 2.5, 30, 60, 90, 600, 5000]),
    st.lists(st.floats(0, 200), min_size=1, max_size=40).map(lambda times: times * 30),
)
def test_no_minute_holds_more_than_the_limit(requests_per_minute, arrivals):
    async def main():
        return await leave_all(make(requests_per_minute), arrivals)

    times = [time for time, _ in run_virtually(main())]
    assert len(times) == len(arrivals)
    for first, start in enumerate(times):
        within = sum(time < start + 60 - EPSILON for time in times[first:])
        assert within <= math.ceil(requests_per_minute)


@settings(max_examples=20)
@given(st.sampled_from([30, 90, 600]), st.integers(2, 300))
def test_a_queue_moves_at_the_full_rate(requests_per_minute, number):
    async def main():
        return await leave_all(make(requests_per_minute), [0.0] * number)

    last = max(time for time, _ in run_virtually(main()))
    burst = max(1.0, requests_per_minute / 60)
    assert last <= (number - 1) * 60 / (requests_per_minute - burst + 1) + EPSILON


@pytest.mark.parametrize("requests_per_minute", [None, 60, 600])
def test_first_come_first_gone(requests_per_minute):
    async def main():
        return await leave_all(make(requests_per_minute), [0.001 * number for number in range(50)])

    assert [number for _, number in run_virtually(main())] == list(range(50))


def test_without_a_limit_nobody_waits():
    async def main():
        return await leave_all(make(None), [0.0] * 20)

    assert {time for time, _ in run_virtually(main())} == {0.0}


@pytest.mark.parametrize("requests_per_minute", [None, 60])
def test_a_pause_holds_back_even_who_waits_already(requests_per_minute):
    async def main():
        pacer = make(requests_per_minute)
        asyncio.get_running_loop().call_later(0.5, pacer.pause, 20.0)
        return await leave_all(pacer, [0.0, 0.6, 0.7, 30.0])

    times = [time for time, _ in run_virtually(main())]
    apart = 0.0 if requests_per_minute is None else 1.0
    assert times == pytest.approx([0, 20.5, 20.5 + apart, 30], abs=EPSILON)


def test_after_a_pause_there_is_no_burst():
    async def main():
        pacer = make(600)
        pacer.pause(50.0)
        return await leave_all(pacer, [0.0] * 20)

    times = [time for time, _ in run_virtually(main())]
    assert times == pytest.approx([50 + number * 60 / 591 for number in range(20)], abs=EPSILON)


def test_a_shorter_pause_does_not_end_a_longer_one():
    async def main():
        pacer = make(None)
        pacer.pause(10.0)
        pacer.pause(1.0)
        pacer.pause(-5.0)
        return await leave_all(pacer, [0.0])

    assert run_virtually(main())[0][0] == pytest.approx(10, abs=EPSILON)


@pytest.mark.parametrize("seconds", [1e9, math.inf])
def test_no_server_can_pause_for_ever(seconds):
    async def main():
        pacer = make(None)
        pacer.pause(seconds)
        return await leave_all(pacer, [0.0])

    assert run_virtually(main())[0][0] == pytest.approx(MAX_PAUSE_S, abs=EPSILON)


@pytest.mark.parametrize("seed", range(5))
def test_who_is_cancelled_takes_no_turn_and_blocks_nobody(seed):
    """Both the task whose turn comes next and those behind it are cancelled while they wait."""
    chance = random.Random(seed)

    async def main():
        pacer, left = make(60), []

        async def one(number):
            await pacer.wait()
            left.append((now(), number))

        tasks = [asyncio.create_task(one(number)) for number in range(20)]
        await asyncio.sleep(0.5)  # number 0 is gone, number 1 sleeps until its turn
        doomed = {1, *chance.sample(range(2, 20), 8)}
        for number in doomed:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return left, doomed

    left, doomed = run_virtually(main())
    assert [number for _, number in left] == [number for number in range(20) if number not in doomed]
    assert [time for time, _ in left] == pytest.approx(range(len(left)), abs=EPSILON)


def test_it_waits_again_when_a_sleep_ends_early():
    """As real clocks do: a sleep of asyncio may end a clock tick before its time."""
    times = [0.0]

    async def short_sleep(seconds):
        times[0] += max(seconds * 0.9, 1e-9)

    async def main():
        pacer = Pacer(60, clock=lambda: times[0], sleep=short_sleep)
        await pacer.wait()
        await pacer.wait()

    asyncio.run(main())
    assert times[0] >= 1.0
