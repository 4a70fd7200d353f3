"""Prices: exact sums, litellm's table with its gaps, and the import of litellm."""

import logging
import os
import random
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm import prices as module
from ssrctl.critics.llm.litellm_import import import_litellm
from ssrctl.critics.llm.prices import Prices, find_prices, picodollars
from ssrctl.errors import UserError

TABLE = {
    "plain": {"litellm_provider": "openai", "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07},
    "shop/both": {"litellm_provider": "shop", "input_cost_per_token": 3e-06, "output_cost_per_token": 1e-07},
    "cloud-model": {
        "litellm_provider": "vertex_ai-language-models",
        "input_cost_per_token": 1.25e-06,
        "output_cost_per_token": 1e-05,
        "input_cost_per_token_above_200k_tokens": 2.5e-06,
        "output_cost_per_token_above_200k_tokens": 1.5e-05,
        "input_cost_per_token_above_200k_tokens_batches": 1e-06,
    },
    "levels": {
        "litellm_provider": "shop",
        "tiered_pricing": [
            {"range": [0, 32000.0], "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06},
            {"range": [32000.0, 128000.0], "input_cost_per_token": 3e-06, "output_cost_per_token": 4e-06},
        ],
    },
    "torn-levels": {
        "litellm_provider": "shop",
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 1e-06,
        "input_cost_per_token_above_128k_tokens": 2e-06,
    },
    "thinker": {
        "litellm_provider": "shop",
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 2e-06,
        "output_cost_per_reasoning_token": 5e-06,
    },
    "zero": {"litellm_provider": "shop", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
    "half": {"litellm_provider": "shop", "input_cost_per_token": 1e-06},
    "by-request": {"litellm_provider": "shop", "input_cost_per_token": 0, "output_cost_per_token": 1e-06},
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(module, "import_litellm", lambda: SimpleNamespace(model_cost=TABLE))


def test_given_prices_go_before_the_table_and_need_no_litellm(monkeypatch):
    monkeypatch.setattr(module, "import_litellm", lambda: pytest.fail("litellm was imported"))
    assert find_prices(["plain"], 0.15, 0.6) == Prices(1.5e-07, 6e-07)
    assert find_prices(["anything"], 0, 0) == Prices(0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("plain", Prices(1.5e-07, 6e-07)),
        ("openai/plain", Prices(1.5e-07, 6e-07)),
        ("shop/both", Prices(3e-06, 1e-07)),
        ("vertex_ai/cloud-model", Prices(1.25e-06, 1e-05, ((200_000, 2.5e-06, 1.5e-05),))),
        ("shop/levels", Prices(1e-06, 2e-06, ((32_000, 3e-06, 4e-06),))),
        ("thinker", Prices(1e-06, 5e-06)),
        ("groq/plain", None),  # another provider's price
        ("both", None),
        ("nope", None),
        ("openai/", None),
        ("", None),
    ],
)
def test_the_table_is_asked_with_and_without_the_provider(table, model, found):
    assert find_prices([model], None, None) == found


@pytest.mark.parametrize("model", ["zero", "half", "by-request", "torn-levels"])
def test_a_price_that_lacks_or_is_zero_is_unknown(table, model):
    assert find_prices([model], None, None) is None
    assert find_prices(["plain", model], None, None) is None


def test_with_fallbacks_the_dearest_counts(table):
    found = find_prices(["plain", "shop/both", "cloud-model"], None, None)
    assert found == Prices(3e-06, 1e-05, ((200_000, 2.5e-06, 1.5e-05),))
    assert found.cost(300_000, 1) == pytest.approx(300_000 * 3e-06 + 1.5e-05, rel=1e-12)


def test_a_long_prompt_is_dearer_from_one_token_above_the_limit_on():
    prices = Prices(1e-06, 2e-06, ((1000, 3e-06, 4e-06),))
    assert prices.cost(1000, 10) == 1000 * 1e-06 + 10 * 2e-06
    assert prices.cost(1001, 10) == 1001 * 3e-06 + 10 * 4e-06


@given(
    st.decimals(0, 1000, places=6),
    st.decimals(0, 1000, places=6),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
)
def test_costs_are_exact(input_price, output_price, prompt_tokens, completion_tokens):
    prices = find_prices(["m"], float(input_price), float(output_price))
    exact = (prompt_tokens * Fraction(input_price) + completion_tokens * Fraction(output_price)) / 10**6
    assert Fraction(prices.picodollars(prompt_tokens, completion_tokens), 10**12) == exact
    assert prices.cost(prompt_tokens, completion_tokens) == float(exact)


def test_finer_prices_are_rounded_up():
    assert Prices(1e-13, 0.0).picodollars(7, 7) == 7
    assert picodollars(1.9e-12, up=False) == 1


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_prices_and_budgets_must_be_finite(number):
    for name in ("critic_budget_usd", "critic_input_price", "critic_output_price"):
        prices = {"critic_input_price": 1.0, "critic_output_price": 1.0} | {name: number}
        with pytest.raises(UserError, match=name.replace("_", "-")):
            CriticOptions(**prices)


def test_the_true_table_and_a_silent_litellm():
    litellm = import_litellm()
    assert os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert not logging.getLogger("LiteLLM").isEnabledFor(logging.CRITICAL)
    assert not logging.getLogger("LiteLLM Router").isEnabledFor(logging.CRITICAL)
    rows = {name: row for name, row in litellm.model_cost.items() if row.get("mode") == "chat"}
    found = {name: find_prices([name], None, None) for name in rows}
    known = {name: prices for name, prices in found.items() if prices is not None}
    assert len(known) > 1000
    for name in random.Random(0).sample(sorted(known), 200):
        row = rows[name]
        if "input_cost_per_token" in row:
            assert (known[name].input_usd, known[name].output_usd) >= (
                row["input_cost_per_token"],
                row["output_cost_per_token"],
            )
    assert find_prices(["openai/gpt-4o-mini"], None, None) is not None
    assert find_prices(["openai/no-such-model"], None, None) is None
    assert find_prices(["ollama/llama3"], None, None) is None  # and no local server is asked about it


def test_litellm_is_imported_by_nothing_at_the_top():
    code = "import sys, ssrctl.critics.llm.meter, ssrctl.critics.llm.cache, ssrctl.critics.llm.pacing, ssrctl.critics.llm.ledger\n"
    code += "sys.exit('litellm' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_litellm_the_remedy_is_pip(monkeypatch):
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(UserError, match="pip install 'ssrctl\\[critic\\]'"):
        import_litellm.__wrapped__()


def test_a_broken_litellm_says_what_is_broken(monkeypatch, tmp_path):
    (tmp_path / "litellm.py").write_text("import no_such_module_of_litellm")
    monkeypatch.delitem(sys.modules, "litellm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no_such_module_of_litellm"):
        import_litellm.__wrapped__()
