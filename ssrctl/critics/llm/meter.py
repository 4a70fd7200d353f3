"""The budget of paid calls: their cost so far and their maximum cost, so that the budget is never overrun.

Before a call is sent, its maximum cost is reserved. Afterwards the reservation is settled at the provider's token
counts, released if the call was certainly not billed, or forfeited (it counts as spent) if that is unknown. Spent and
reserved money never add up to more than the budget, with one exception that no client can prevent: a provider that
counts more tokens than were reserved. Then the true cost is recorded, no further call is granted, and the overrun is
the excess of the calls that were in flight.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssrctl.critics.llm.prices import PICO, Prices, picodollars
from ssrctl.errors import UserError

BYTES_PER_MESSAGE = 16  # for the chat template's markup around a message; known templates take 4 to 8 tokens


class BudgetReached(Exception):
    """A call does not fit into the rest of the budget, even if every call in flight were free."""


@dataclass(frozen=True, eq=False)
class Reservation:
    """The permission for one call. To be closed exactly once: by settle, forfeit or release of its meter.

    Attributes:
        picodollars: the maximum cost of the call; 0 when no price is known.
    """

    picodollars: int


def max_prompt_tokens(messages: Sequence[Mapping[str, str]], schema: str = "") -> int:
    """Return an upper bound on the tokens of a prompt: its bytes in UTF-8.

    No token of a byte-level vocabulary is shorter than a byte. The exception are a few rare characters that a
    tokenizer's text normalisation lengthens.

    Args:
        messages: chat messages; the bound includes roles and chat template markup.
        schema: json schema of the reply, which providers put into the prompt.
    """
    texts = [message["content"] for message in messages]
    size = sum(len(text.encode("utf-8", errors="surrogatepass")) for text in (*texts, schema))
    return size + BYTES_PER_MESSAGE * (len(texts) + 1)


class Meter:
    """Keeps the account of a run. For the tasks of one event loop; the properties may be read from any thread.

    Reservations are granted in the order of the requests, so that a long prompt is not passed over indefinitely by
    short ones. A task must close one reservation before it asks for the next: two tasks that each hold one and wait
    for another might wait for each other.

    Args:
        budget_usd: the hard cap, finite and above 0; None is no cap.
        prices: prices of the judge; None when they are not known.

    Raises:
        UserError: a budget without prices, which cannot be kept.
    """

    def __init__(self, budget_usd: float | None, prices: Prices | None) -> None:
        if budget_usd is not None and prices is None:
            raise UserError(
                f"a budget of ${budget_usd:g} cannot be kept: the price of the critic's model is not known",
                "give --critic-input-price and --critic-output-price, in US dollars per million tokens",
            )
        self.prices = prices
        self._budget = None if budget_usd is None else picodollars(budget_usd, up=False)
        self._settled = self._forfeited = self._reserved = 0
        self._open: set[Reservation] = set()
        self._waiting: deque[tuple[Reservation, asyncio.Future[bool]]] = deque()

    @property
    def spent_usd(self) -> float:
        """US dollars that count as spent, forfeited reservations included; 0 when no price is known."""
        return (self._settled + self._forfeited) / PICO

    @property
    def unconfirmed_usd(self) -> float:
        """The forfeited part of the spent dollars: calls that may have been billed, at their maximum cost."""
        return self._forfeited / PICO

    @property
    def reserved_usd(self) -> float:
        """Maximum cost of the calls in flight, in US dollars."""
        return self._reserved / PICO

    async def reserve(self, prompt_bytes: int, max_reply_tokens: int) -> Reservation:
        """Reserve the cost of a call; waits as long as calls in flight may still leave room for it.

        Args:
            prompt_bytes: an upper bound on the prompt's tokens, such as ``max_prompt_tokens(messages)``.
            max_reply_tokens: the token limit of the reply.

        Raises:
            BudgetReached: it would not fit even if every call in flight were free.
        """
        cost = 0 if self.prices is None else self.prices.picodollars(prompt_bytes, max_reply_tokens)
        reservation = Reservation(cost)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((reservation, answer))
        self._grant()
        try:
            granted = await answer
        except asyncio.CancelledError:
            if reservation in self._open:  # granted, and cancelled before the task continued
                self.release(reservation)
            else:
                self._grant()  # those behind may fit where this one did not
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
            The cost of the call in US dollars; None when no price is known.
        """
        cost = 0 if self.prices is None else self.prices.picodollars(prompt_tokens, completion_tokens)
        self._close(reservation)
        self._settled += cost
        self._grant()
        return None if self.prices is None else cost / PICO

    def forfeit(self, reservation: Reservation) -> float | None:
        """Close the reservation of a call that may have been billed, though its reply was lost.

        All of it counts as spent. Returns the amount in US dollars; None when no price is known.
        """
        self._close(reservation)
        self._forfeited += reservation.picodollars
        self._grant()
        return None if self.prices is None else reservation.picodollars / PICO

    def release(self, reservation: Reservation) -> None:
        """Close the reservation of a call that was certainly not billed, because it never left or was refused."""
        self._close(reservation)
        self._grant()

    def _close(self, reservation: Reservation) -> None:
        assert reservation in self._open, "a reservation is closed once, and by the meter that gave it"
        self._open.remove(reservation)
        self._reserved -= reservation.picodollars

    def _grant(self) -> None:
        """Refuse every waiting reservation that can never fit; then grant from the front while the budget allows."""
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
