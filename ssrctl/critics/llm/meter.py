"""The meter: what paid calls may still cost, so that a budget is never overrun.

Before a call is sent, the most that it can cost is reserved. Afterwards the reservation is settled at what the
provider counted, released if the call was certainly not billed, or forfeited (it counts as spent) if nobody can tell.
Money that was spent and money that is reserved never add up to more than the budget, with one exception that no
client can prevent: a provider that counts more tokens than were reserved. Then the truth is kept, nothing more is
granted, and the overrun is the excess of the calls that were in flight.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssrctl.critics.llm.prices import PICO, Prices, find_prices, picodollars
from ssrctl.errors import UserError

__all__ = ["BudgetReached", "Meter", "Prices", "Reservation", "find_prices", "most_prompt_tokens"]

BYTES_PER_MESSAGE = 16  # for the marks that a chat template puts around a message; those known take 4 to 8 tokens


class BudgetReached(Exception):
    """A call does not fit in what is left of the budget, whatever becomes of the calls in flight."""


@dataclass(frozen=True, eq=False)
class Reservation:
    """The right to one call. To be closed exactly once: by settle, forfeit or release of its meter.

    Attributes:
        picodollars: the most that the call can cost; 0 when no price is known.
    """

    picodollars: int


def most_prompt_tokens(messages: Sequence[Mapping[str, str]], schema: str = "") -> int:
    """An upper bound on the tokens of a prompt: its bytes in UTF-8.

    No token of a byte-level vocabulary is shorter than a byte. What a tokenizer's text normalisation lengthens (a few
    rare characters) is the exception.

    Args:
        messages: chat messages; roles and the marks around them are allowed for.
        schema: json schema of the reply, which providers put into the prompt.
    """
    texts = [message["content"] for message in messages]
    size = sum(len(text.encode("utf-8", errors="surrogatepass")) for text in (*texts, schema))
    return size + BYTES_PER_MESSAGE * (len(texts) + 1)


class Meter:
    """Keeps the account of a run. For the tasks of one event loop; the properties may be read from any thread.

    Reservations are granted in the order in which they were asked for, so that a long prompt is not passed over for
    ever by short ones. A task must close one reservation before it asks for the next: two tasks that each hold one
    and wait for another might wait for each other.

    Args:
        budget_usd: the hard cap, above 0; None is no cap.
        prices: of the judge; None when they are not known.

    Raises:
        UserError: a budget without prices, which could not be kept.
    """

    def __init__(self, budget_usd: float | None, prices: Prices | None) -> None:
        if budget_usd is not None and prices is None:
            raise UserError(
                f"a budget of ${budget_usd:g} cannot be kept: no price of the critic's model is known",
                "give --input-price and --output-price, in US dollars per million tokens",
            )
        if budget_usd is not None and not math.isfinite(budget_usd):
            raise UserError(f"a budget of {budget_usd:g} dollars is no cap", "leave --budget-usd out for no limit")
        self.prices = prices
        self._budget = None if budget_usd is None else picodollars(budget_usd, up=False)
        self._settled = self._forfeited = self._reserved = 0
        self._open: set[Reservation] = set()
        self._waiting: deque[tuple[Reservation, asyncio.Future[bool]]] = deque()

    @property
    def spent_usd(self) -> float:
        """What counts as spent, forfeited reservations included; 0 when no price is known."""
        return (self._settled + self._forfeited) / PICO

    @property
    def unconfirmed_usd(self) -> float:
        """The part of it that was forfeited: calls that may have been billed, at the most that they can have cost."""
        return self._forfeited / PICO

    @property
    def reserved_usd(self) -> float:
        """The most that the calls in flight can cost."""
        return self._reserved / PICO

    async def reserve(self, prompt_bytes: int, max_reply_tokens: int) -> Reservation:
        """The right to send a call; waits as long as calls in flight may still leave room for it.

        Args:
            prompt_bytes: an upper bound on the prompt's tokens, such as ``most_prompt_tokens(messages)``.
            max_reply_tokens: the limit on the reply that is sent with the call.

        Raises:
            BudgetReached: it would not fit even if every call in flight were free.
        """
        cost = 0 if self.prices is None else self.prices.picodollars(prompt_bytes, max_reply_tokens)
        reservation = Reservation(cost)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((reservation, answer))
        self._serve()
        try:
            granted = await answer
        except asyncio.CancelledError:
            if reservation in self._open:  # granted, and cancelled before the task could go on
                self.release(reservation)
            else:
                self._serve()  # those behind may fit where this one did not
            raise
        if not granted:
            raise self._refusal(reservation)
        return reservation

    def settle(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Close the reservation of a call that was answered.

        Args:
            reservation: an open one of this meter.
            prompt_tokens, completion_tokens: as the provider counted them, 0 or more. When it did not count them,
                forfeit the reservation instead.

        Returns:
            What the call cost, in US dollars; None when no price is known.
        """
        cost = 0 if self.prices is None else self.prices.picodollars(prompt_tokens, completion_tokens)
        self._close(reservation)
        self._settled += cost
        self._serve()
        return None if self.prices is None else cost / PICO

    def forfeit(self, reservation: Reservation) -> float | None:
        """Close the reservation of a call that may have been billed, though its reply was lost: all of it counts as
        spent. Returns that, in US dollars; None when no price is known."""
        self._close(reservation)
        self._forfeited += reservation.picodollars
        self._serve()
        return None if self.prices is None else reservation.picodollars / PICO

    def release(self, reservation: Reservation) -> None:
        """Close the reservation of a call that was certainly not billed, because it never left or was refused."""
        self._close(reservation)
        self._serve()

    def _close(self, reservation: Reservation) -> None:
        assert reservation in self._open, "a reservation is closed once, and by the meter that gave it"
        self._open.remove(reservation)
        self._reserved -= reservation.picodollars

    def _serve(self) -> None:
        """Refuse every waiter that can never fit; then grant from the front as far as the money goes."""
        if self._budget is not None:
            left = self._budget - self._settled - self._forfeited
            for reservation, answer in self._waiting:
                if reservation.picodollars > left and not answer.done():
                    answer.set_result(False)
        while self._waiting:
            reservation, answer = self._waiting[0]
            if not answer.done():  # neither refused nor cancelled
                if not self._fits(reservation):
                    break
                self._reserved += reservation.picodollars
                self._open.add(reservation)
                answer.set_result(True)
            self._waiting.popleft()

    def _fits(self, reservation: Reservation) -> bool:
        used = self._settled + self._forfeited + self._reserved
        return self._budget is None or used + reservation.picodollars <= self._budget

    def _refusal(self, reservation: Reservation) -> BudgetReached:
        assert self._budget is not None
        unconfirmed = f" (${self.unconfirmed_usd:.4g} of it unconfirmed)" if self._forfeited else ""
        return BudgetReached(
            f"the budget of ${self._budget / PICO:g} is reached: ${self.spent_usd:.4g} is spent{unconfirmed}, "
            f"and the next call can cost ${reservation.picodollars / PICO:.3g}"
        )
