"""The meter: the budget holds whatever the tasks do, nobody waits for ever, and the account is exact."""

import asyncio
import gc
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import now, run_virtually

from ssrctl.critics.llm.meter import BudgetReached, Meter, max_prompt_tokens
from ssrctl.critics.llm.prices import Prices
from ssrctl.errors import UserError

CENTS = Prices(0.01, 0.01)  # so that tokens are cents


def cents(usd):
    """Exact: the test's amounts are whole cents."""
    count = round(usd * 100)
    assert abs(usd * 100 - count) < 1e-6
    return count


def account(meter):
    return cents(meter.spent_usd), cents(meter.reserved_usd), cents(meter.unconfirmed_usd)


# ------------------------------------------------------------------------------------------------
# one call


def test_a_call_is_settled_at_what_it_took():
    async def main():
        meter = Meter(1.0, CENTS)
        held = await meter.reserve(20, 30)
        assert account(meter) == (0, 50, 0)
        assert meter.settle(held, 12, 3) == 0.15
        assert account(meter) == (15, 0, 0)

    run_virtually(main())


def test_a_forfeited_call_counts_in_full():
    async def main():
        meter = Meter(1.0, CENTS)
        assert meter.forfeit(await meter.reserve(20, 30)) == 0.5
        assert account(meter) == (50, 0, 50)

    run_virtually(main())


def test_a_released_call_costs_nothing():
    async def main():
        meter = Meter(1.0, CENTS)
        meter.release(await meter.reserve(20, 80))
        assert account(meter) == (0, 0, 0)

    run_virtually(main())


def test_the_budget_can_be_spent_to_the_last_cent():
    async def main():
        meter = Meter(0.3, Prices(0.1, 0.1))  # three times 0.1 is more than 0.3 in floats
        for _ in range(3):
            meter.settle(await meter.reserve(1, 0), 1, 0)
        assert meter.spent_usd == 0.3
        with pytest.raises(BudgetReached):
            await meter.reserve(1, 0)

    run_virtually(main())


def test_what_never_fits_is_refused_at_once_with_the_numbers():
    async def main():
        meter = Meter(1.0, CENTS)
        meter.forfeit(await meter.reserve(30, 0))
        with pytest.raises(BudgetReached, match=r"\$1 is reached: \$0\.3 is spent \(\$0\.3 .*can cost \$0\.71"):
            await meter.reserve(71, 0)
        meter.release(await meter.reserve(70, 0))  # a smaller one is still welcome
        assert now() == 0

    run_virtually(main())


@pytest.mark.parametrize("close", ["settle", "forfeit", "release"])
@pytest.mark.parametrize("again", ["settle", "forfeit", "release"])
def test_a_reservation_is_closed_once(close, again):
    def do(meter, name, held):
        return meter.settle(held, 1, 1) if name == "settle" else getattr(meter, name)(held)

    async def main():
        meter = Meter(1.0, CENTS)
        held = await meter.reserve(20, 30)
        do(meter, close, held)
        before = account(meter)
        with pytest.raises(AssertionError, match="once"):
            do(meter, again, held)
        assert account(meter) == before

    run_virtually(main())


def test_a_reservation_of_another_meter_is_not_taken():
    async def main():
        held = await Meter(1.0, CENTS).reserve(1, 1)
        with pytest.raises(AssertionError, match="meter that gave it"):
            Meter(1.0, CENTS).release(held)

    run_virtually(main())


def test_without_a_budget_everything_is_granted_and_counted():
    async def main():
        meter = Meter(None, CENTS)
        held = [await meter.reserve(10**6, 10**6) for _ in range(10)]
        for each in held:
            meter.settle(each, 100, 100)
        assert account(meter) == (2000, 0, 0)

    run_virtually(main())


def test_without_prices_no_cost_is_claimed():
    async def main():
        meter = Meter(None, None)
        assert meter.settle(await meter.reserve(100, 100), 50, 50) is None
        assert meter.forfeit(await meter.reserve(100, 100)) is None
        assert account(meter) == (0, 0, 0)

    run_virtually(main())


def test_a_budget_without_prices_cannot_be_kept():
    with pytest.raises(UserError, match="--critic-input-price"):
        Meter(1.0, None)


def test_a_provider_that_counts_more_than_was_reserved_is_believed():
    async def main():
        meter = Meter(1.0, CENTS)
        first, second = await meter.reserve(40, 0), await meter.reserve(40, 0)
        waiting = asyncio.create_task(meter.reserve(40, 0))
        await asyncio.sleep(1)
        meter.settle(first, 70, 0)  # 30 more than it should
        with pytest.raises(BudgetReached):  # though the second call is still in flight
            await waiting
        meter.settle(second, 40, 0)
        assert account(meter) == (110, 0, 0)
        with pytest.raises(BudgetReached):
            await meter.reserve(0, 1)

    run_virtually(main())


# ------------------------------------------------------------------------------------------------
# tasks that wait


def test_waiters_are_served_in_order_and_a_large_one_is_not_passed_over():
    async def main():
        meter, order = Meter(1.0, CENTS), []
        first = await meter.reserve(60, 0)

        async def one(name, size):
            held = await meter.reserve(size, 0)
            order.append((name, now()))
            await asyncio.sleep(1)
            meter.release(held)

        tasks = [asyncio.create_task(one(*each)) for each in [("large", 90), ("small", 10), ("smaller", 5)]]
        await asyncio.sleep(5)
        assert order == []  # the small ones would fit at once
        meter.release(first)
        await asyncio.gather(*tasks)
        assert order == [("large", 5), ("small", 5), ("smaller", 6)]

    run_virtually(main())


def test_all_who_can_no_longer_fit_are_told_though_calls_are_in_flight():
    async def main():
        meter = Meter(1.0, CENTS)
        first, second = await meter.reserve(50, 0), await meter.reserve(50, 0)
        waiting = [asyncio.create_task(meter.reserve(size, 0)) for size in (60, 70, 20)]
        await asyncio.sleep(1)
        assert not any(task.done() for task in waiting)
        meter.settle(first, 50, 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, True, False]
        assert all(isinstance(task.exception(), BudgetReached) for task in waiting[:2])
        meter.settle(second, 20, 0)
        meter.settle(await waiting[2], 20, 0)
        assert account(meter) == (90, 0, 0)

    run_virtually(main())


def test_a_cancelled_waiter_lets_those_behind_it_through():
    async def main():
        meter = Meter(1.0, CENTS)
        first = await meter.reserve(60, 0)
        large, small = (asyncio.create_task(meter.reserve(size, 0)) for size in (90, 10))
        await asyncio.sleep(1)
        large.cancel()
        held = await small
        assert account(meter) == (0, 70, 0)
        meter.release(held)
        meter.release(first)
        assert account(meter) == (0, 0, 0)
        assert large.cancelled()

    run_virtually(main())


def test_a_waiter_that_is_granted_and_cancelled_in_one_tick_gives_it_back():
    async def main():
        meter = Meter(1.0, CENTS)
        first = await meter.reserve(100, 0)
        granted, next_one = (asyncio.create_task(meter.reserve(100, 0)) for _ in range(2))
        await asyncio.sleep(1)
        meter.release(first)  # grants
        granted.cancel()  # before the task could run
        meter.release(await next_one)
        assert granted.cancelled()
        assert account(meter) == (0, 0, 0)

    run_virtually(main())


def test_a_waiter_that_is_refused_and_cancelled_in_one_tick_leaves_no_noise(caplog):
    async def main():
        meter = Meter(1.0, CENTS)
        first = await meter.reserve(100, 0)
        refused = asyncio.create_task(meter.reserve(50, 0))
        await asyncio.sleep(1)
        meter.settle(first, 100, 0)  # refuses
        refused.cancel()
        await asyncio.gather(refused, return_exceptions=True)
        assert account(meter) == (100, 0, 0)
        del refused
        gc.collect()

    run_virtually(main())
    assert caplog.records == []  # asyncio logs exceptions that nobody looks at


# ------------------------------------------------------------------------------------------------
# many tasks


@dataclass(frozen=True)
class Plan:
    """What one task does: when it comes, what it reserves, how long its call takes, how it ends, and when it is
    cancelled (None: never)."""

    arrival: int
    prompt: int
    reply: int
    lasts: int
    end: str
    used: float
    cancelled: int | None


PLANS = st.lists(
    st.builds(
        Plan,
        arrival=st.integers(0, 5),
        prompt=st.integers(0, 40),
        reply=st.integers(0, 40),
        lasts=st.integers(0, 5),
        end=st.sampled_from(["settle", "settle", "forfeit", "release"]),
        used=st.floats(0, 1),
        cancelled=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=25,
)


class Run:
    """Runs plans against a meter, keeping an account of its own."""

    def __init__(self, plans, budget, overrun=1.0):
        self.plans, self.budget, self.overrun = plans, budget, overrun
        self.meter = Meter(budget / 100, CENTS)
        self.spent = self.excess = 0
        self.held = {}
        self.refused = []

    async def call(self, number, plan):
        await asyncio.sleep(plan.arrival)
        try:
            held = await self.meter.reserve(plan.prompt, plan.reply)
        except BudgetReached:
            assert plan.prompt + plan.reply > self.budget - self.spent, "it might still have fitted"
            self.refused.append(number)
            return
        self.held[number] = plan.prompt + plan.reply
        self.check()
        cost, end = 0, "release"
        try:
            await asyncio.sleep(plan.lasts)
            prompt, reply = int(plan.prompt * plan.used * self.overrun), int(plan.reply * plan.used * self.overrun)
            cost, end = {"settle": prompt + reply, "forfeit": self.held[number], "release": 0}[plan.end], plan.end
        except asyncio.CancelledError:
            cost, end = self.held[number], "forfeit"  # the provider may well finish what it began
            raise
        finally:
            self.excess += max(0, cost - self.held.pop(number))
            self.spent += cost
            if end == "settle":
                self.meter.settle(held, prompt, reply)
            else:
                getattr(self.meter, end)(held)
            self.check()

    def check(self):
        spent, reserved, _ = account(self.meter)
        assert spent == self.spent
        assert reserved >= sum(self.held.values())  # more, when a task was granted its own but did not run yet
        assert spent + reserved <= self.budget + self.excess

    async def all(self):
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self.call(number, plan)) for number, plan in enumerate(self.plans)]
        for task, plan in zip(tasks, self.plans, strict=True):
            if plan.cancelled is not None:
                loop.call_later(plan.cancelled, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert result is None or isinstance(result, asyncio.CancelledError), result
        self.check()
        assert account(self.meter)[1] == 0
        if self.spent < self.budget:  # nothing leaked: all that is left can be had
            self.meter.release(await self.meter.reserve(self.budget - self.spent, 0))


@settings(max_examples=120)
@given(PLANS, st.integers(1, 300))
def test_spent_and_reserved_never_exceed_the_budget_and_nobody_waits_for_ever(plans, budget):
    run_virtually(Run(plans, budget).all())


@settings(max_examples=60)
@given(PLANS, st.integers(1, 300), st.floats(1, 5))
def test_an_overrun_is_never_more_than_what_the_provider_counted_too_much(plans, budget, overrun):
    run_virtually(Run(plans, budget, overrun).all())


def test_without_cancellation_small_calls_use_most_of_the_budget():
    """Reservations are five times what calls take; the money is still used until one more might not fit."""
    plans = [Plan(0, 40, 10, 1, "settle", 0.2, None)] * 200
    run = Run(plans, 500)
    run_virtually(run.all())
    assert 500 - 50 < run.spent <= 500
    assert len(run.refused) == 200 - run.spent // 10


# ------------------------------------------------------------------------------------------------
# the bound on prompts


def test_the_bound_counts_bytes_roles_and_the_schema():
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "abc"}]
    bound = max_prompt_tokens(messages)
    assert bound >= 2 + 3
    assert max_prompt_tokens(messages, "x" * 100) == bound + 100
    assert max_prompt_tokens([*messages, {"role": "user", "content": ""}]) > bound
    assert max_prompt_tokens([{"role": "user", "content": "\ud800"}]) >= 3


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_no_prompt_has_more_tokens_than_the_bound(bpe_tokenizer, texts):
    """With the marks of a common chat template, each cut into bytes by a tokenizer that does not know them."""
    messages = [{"role": "user", "content": text} for text in texts]
    num_tokens = sum(len(bpe_tokenizer(text)["input_ids"]) for text in texts)
    num_marks = 6 * len(texts) + 6
    assert num_tokens + num_marks <= max_prompt_tokens(messages)
