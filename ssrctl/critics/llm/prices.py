"""Prices of tokens.

Money is counted in whole picodollars (1e-12 US dollars), so that sums are exact: thousands of float additions drift,
and a cap that holds "to rounding" cannot be tested. Prices are given per million tokens with a few decimals, so a
token's price is a whole number of picodollars too; a finer one is rounded up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from ssrctl.critics.llm.litellm_import import import_litellm

PICO = 10**12
MILLION = 10**6
LONG_PROMPT = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")


def picodollars(usd: float, *, up: bool) -> int:
    """Convert dollars to whole picodollars, rounded up or down.

    The float stands for the decimal number that Python prints for it: 0.1 is a tenth.
    """
    rounding = ROUND_CEILING if up else ROUND_FLOOR
    return int((Decimal(str(usd)) * PICO).to_integral_value(rounding))


@dataclass(frozen=True)
class Prices:
    """US dollars per token.

    Attributes:
        input_usd, output_usd: per token of the prompt and of the reply; finite, 0 or more.
        longer: ``(tokens, input_usd, output_usd)``: higher prices of all tokens of a call whose prompt has more than
            ``tokens`` tokens, where the provider has such prices.
    """

    input_usd: float
    output_usd: float
    longer: tuple[tuple[int, float, float], ...] = ()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of one call in US dollars."""
        return self.picodollars(prompt_tokens, completion_tokens) / PICO

    def picodollars(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Return the exact cost of one call in picodollars."""
        assert prompt_tokens >= 0 and completion_tokens >= 0
        reached = [(self.input_usd, self.output_usd)]
        reached += [(paid_in, paid_out) for above, paid_in, paid_out in self.longer if prompt_tokens > above]
        paid_in, paid_out = (max(column) for column in zip(*reached, strict=True))
        return prompt_tokens * picodollars(paid_in, up=True) + completion_tokens * picodollars(paid_out, up=True)


def find_prices(models: Sequence[str], input_price: float | None, output_price: float | None) -> Prices | None:
    """Return the prices of a judge and its fallbacks.

    Args:
        models: litellm names. A reply of any of them is charged at the highest price among them.
        input_price, output_price: US dollars per million tokens, finite, in place of litellm's table; both or neither.

    Returns:
        None when no price is given and the installed litellm's table lacks that of a model. A price of 0 in the table
        counts as lacking: it marks models without an entered price. Your own server can be given as free.

    Raises:
        UserError: no price is given and litellm is not installed.
    """
    assert models and (input_price is None) == (output_price is None)
    if input_price is not None and output_price is not None:
        return Prices(_per_token(input_price), _per_token(output_price))
    table = import_litellm().model_cost
    found = [_listed(table, model) for model in models]
    known = [prices for prices in found if prices is not None]
    return _highest(known) if len(known) == len(found) else None


def most_reply_tokens(model: str) -> int | None:
    """Return the longest reply that litellm's table gives for a model; None where it gives none.

    Raises:
        UserError: litellm is not installed.
    """
    row = _row(import_litellm().model_cost, model) or {}
    most = row.get("max_output_tokens")
    return most if isinstance(most, int) and most > 0 else None


def _per_token(price: float) -> float:
    return float(Decimal(str(price)) / MILLION)  # the float nearest to the true quotient prints with few digits


def _highest(prices: Iterable[Prices]) -> Prices:
    every = list(prices)
    return Prices(
        max(each.input_usd for each in every),
        max(each.output_usd for each in every),
        tuple(longer for each in every for longer in each.longer),
    )


def _listed(table: Mapping[str, Mapping[str, Any]], model: str) -> Prices | None:
    """Return the prices of ``model`` in litellm's table, which lists it with or without its provider as prefix.

    ``litellm.get_model_info`` cannot be used: it gives 0 for a price that the table lacks, and for some providers it
    asks servers on the network.
    """
    row = _row(table, model)
    if row is None:
        return None
    levels = [(0, _rates(row)), *_longer(row)]
    usual = levels.pop(0)[1] or (levels.pop(0)[1] if levels else None)
    if usual is None or any(rates is None for _, rates in levels):
        return None
    return Prices(*usual, tuple((above, *rates) for above, rates in levels if rates is not None))


def _row(table: Mapping[str, Mapping[str, Any]], model: str) -> Mapping[str, Any] | None:
    row = table.get(model)
    if row is not None:
        return row
    provider, _, name = model.partition("/")
    row = table.get(name)
    return row if row is not None and str(row.get("litellm_provider", "")).startswith(provider) else None


def _longer(row: Mapping[str, Any]) -> list[tuple[int, tuple[float, float] | None]]:
    """Return a row's prices for long prompts as (tokens, prices), in both of the table's forms."""
    levels = [(int(level["range"][0]), _rates(level)) for level in row.get("tiered_pricing") or () if "range" in level]
    for key in row:
        if match := LONG_PROMPT.fullmatch(key):
            levels.append((1000 * int(match[1]), _rates(row, key.removeprefix("input_cost_per_token"))))
    return sorted(levels, key=lambda level: level[0])


def _rates(row: Mapping[str, Any], suffix: str = "") -> tuple[float, float] | None:
    """Return US dollars per token of prompt and reply (thoughts included); None if either price is missing."""
    paid_in = row.get("input_cost_per_token" + suffix)
    paid_out = row.get("output_cost_per_token" + suffix)
    if not paid_in or not paid_out:
        return None
    return float(paid_in), float(max(paid_out, row.get("output_cost_per_reasoning_token") or 0.0))
