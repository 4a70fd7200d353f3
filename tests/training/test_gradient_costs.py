"""The cost model against counting token by token, and its cuts against trying all of them."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.unit_gradients import CASES, build

from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.training.step_gradients.cost import (
    CACHE_OVERHEAD,
    COSTS,
    ModelCosts,
    PassCosts,
    choose_method,
    chunked_cost,
    kept_cost,
    plan_boundaries,
    truncated_cost,
)
from ssrctl.training.step_gradients.shape import GroupShape, UnitSpan
from ssrctl.training.unit_gradients import GradientTask, automatic_method

COSTS_OF_A_MODEL = ModelCosts.from_sizes(
    body=400_000, head=30_000, num_layers=4, attention_width=64, cache_width=32, device="cpu"
)
BARE = PassCosts(chunk=0.0, logits=0.0, head=0.0, token=1.0, pair=0.0, cached=0.0, without_logits=1.0)


def slow_pass(costs, rows, columns, past, logits):
    """One direction of one chunk, a token and a key at a time."""
    total = costs.chunk + (costs.logits if logits else 0.0)
    share = 1.0 if logits else costs.without_logits
    for _ in range(rows):
        total += share * costs.cached * past
        for number, _ in enumerate(columns):
            total += share * (costs.token + costs.pair * (past + number + 1))
        total += logits * costs.head
    return total


def slow_cut(shape, costs, cuts):
    """The chunked way with given cuts, from lists of columns."""
    total, start = 0.0, 0
    for cut in cuts:
        columns = list(range(start, cut))
        rows = [length for length in shape.lengths if shape.prompt_length + length - 1 > start]
        count = 1 if columns == list(range(shape.prompt_length)) else len(rows)
        predicted = [c - shape.prompt_length + 1 for c in columns if c >= shape.prompt_length - 1]
        total += slow_pass(costs.forward, count, columns, start, len(predicted))
        for unit in shape.units:
            # inputs on which the unit depends: all that come before its last token
            if any(column < shape.prompt_length + unit.end - 1 for column in columns):
                own = any(unit.start <= token < unit.end for token in predicted)
                total += slow_pass(costs.backward, count, columns, start, len(predicted) if own else 0)
        start = cut
    return total


@st.composite
def shapes(draw):
    chance = random.Random(draw(st.integers(0, 10**6)))
    lengths = tuple(chance.randint(1, 40) for _ in range(chance.randint(1, 5)))
    units = []
    for _ in range(chance.randint(1, 5)):
        end = chance.randint(1, max(lengths))
        units.append(UnitSpan(chance.randrange(end), end, chance.randint(1, len(lengths))))
    return GroupShape(chance.randint(1, 30), lengths, tuple(units))


@given(shapes(), st.sampled_from([0.0, 0.2, 1.0, 30.0]))
@settings(max_examples=40)
def test_no_other_cuts_are_cheaper(shape, scale):
    """``scale`` multiplies what a chunk costs by itself: from cutting everywhere to hardly at all."""
    costs = ModelCosts(
        *(
            dataclasses.replace(c, chunk=scale * c.chunk, logits=scale * c.logits)
            for c in (COSTS_OF_A_MODEL.forward, COSTS_OF_A_MODEL.backward)
        )
    )
    last = max(shape.input_end(unit.end) for unit in shape.units)
    candidates = sorted({shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)} - {last})
    possible = [
        (*chosen, last) for size in range(len(candidates) + 1) for chosen in itertools.combinations(candidates, size)
    ]
    found = plan_boundaries(shape, costs)
    assert tuple(found) in possible
    cheapest = min(slow_cut(shape, costs, cuts) for cuts in possible)
    assert slow_cut(shape, costs, found) == pytest.approx(cheapest, rel=1e-12)
    assert chunked_cost(shape, costs, False) == pytest.approx(
        cheapest + CACHE_OVERHEAD * costs.forward.chunk, rel=1e-12
    )


def test_cuts_where_they_pay():
    shape = GroupShape(10, (30, 20), (UnitSpan(0, 10, 2), UnitSpan(8, 20, 2), UnitSpan(15, 30, 1)))
    free = ModelCosts(BARE, BARE)
    assert plan_boundaries(shape, free) == [10, 19, 29, 39]
    dear = ModelCosts(dataclasses.replace(BARE, chunk=1e6), BARE)
    assert plan_boundaries(shape, dear) == [39]
    assert plan_boundaries(GroupShape(10, (30,), ()), free) == []
    # 10 prompt tokens for one row instead of two save 10 forward and 30 backward
    for chunk, cuts in ((39.0, [10, 39]), (41.0, [39])):
        one = GroupShape(10, (30, 30), (UnitSpan(0, 30, 2),) * 3)
        assert plan_boundaries(one, ModelCosts(dataclasses.replace(BARE, chunk=chunk), BARE)) == cuts


@given(shapes(), st.booleans())
def test_kept_and_truncated_count_whole_passes(shape, all_logprobs):
    costs, width = COSTS_OF_A_MODEL, max(shape.lengths)
    whole = (len(shape.lengths), range(shape.prompt_length + width - 1), 0, width)
    forward, backward = slow_pass(costs.forward, *whole), slow_pass(costs.backward, *whole)
    assert kept_cost(shape, costs, all_logprobs) == pytest.approx(forward + len(shape.units) * backward, rel=1e-12)
    expected = forward if all_logprobs else 0.0
    for unit in shape.units:
        part = (unit.num_rows, range(shape.prompt_length + unit.end - 1), 0, unit.end)
        expected += slow_pass(costs.forward, *part) + slow_pass(costs.backward, *part)
    assert truncated_cost(shape, costs, all_logprobs) == pytest.approx(expected, rel=1e-12)


def test_the_tail_is_run_only_if_asked_for():
    shape = GroupShape(4, (20, 9), (UnitSpan(0, 8, 2),))
    free = ModelCosts(BARE, BARE)
    # prompt 4 once, then 7 columns of two rows, twice: forward and backward
    assert chunked_cost(shape, free, False) == 2 * (4 + 2 * 7)
    # the rest of the first row, and the one input of the second that is left: 12 columns of two rows
    assert chunked_cost(shape, free, True) == 2 * (4 + 2 * 7) + 12 * 2
    assert chunked_cost(GroupShape(4, (20, 9), ()), free, True) == 23 * 2


@given(shapes(), st.booleans())
def test_the_cheapest_possible_way_is_taken(shape, all_logprobs):
    costs = {name: cost(shape, COSTS_OF_A_MODEL, all_logprobs) for name, cost in COSTS.items()}
    assert set(costs) == {"kept", "truncated", "chunked"}
    for size in (1, 2, 3):
        for able in itertools.combinations(costs, size):
            found = choose_method(shape, COSTS_OF_A_MODEL, all_logprobs=all_logprobs, methods=able)
            assert found in able and costs[found] == min(costs[name] for name in able)


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="no method"):
        choose_method(GroupShape(4, (5,), ()), COSTS_OF_A_MODEL, all_logprobs=True, methods=())


@pytest.mark.parametrize(
    ("lengths", "units", "expected"),
    [
        # one unit that takes all of one short response: nothing to save
        ((12,), (UnitSpan(0, 12, 1),), "kept"),
        # many long steps of a large group
        ((640,) * 8, tuple(UnitSpan(40 * i, 40 * i + 40, 8) for i in range(16)), "chunked"),
    ],
)
def test_choices_for_a_model_of_135_million_parameters(lengths, units, expected):
    costs = ModelCosts.from_sizes(
        body=106_000_000, head=28_300_000, num_layers=30, attention_width=576, cache_width=192
    )
    assert choose_method(GroupShape(64, lengths, units), costs, all_logprobs=True) == expected


def test_costs_follow_from_the_models_sizes():
    tied, untied = build("qwen3"), build("llama")
    for model in (tied, untied):
        layers = sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
        expected = ModelCosts.from_sizes(
            body=layers, head=model.lm_head.weight.numel(), num_layers=3, attention_width=24, cache_width=12
        )
        assert ModelCosts.of(model) == expected
    assert ModelCosts.from_sizes(
        body=1, head=1, num_layers=1, attention_width=1, cache_width=1, device="xpu"
    ) == ModelCosts.from_sizes(body=1, head=1, num_layers=1, attention_width=1, cache_width=1, device="cuda")


def test_the_automatic_choice_does_what_the_model_can(monkeypatch):
    model, case = build("qwen3"), CASES["ragged"]
    task = GradientTask(model, case.batch(), case.units)
    for wanted in COSTS:
        for name in COSTS:
            monkeypatch.setitem(COSTS, name, lambda *_, name=name, wanted=wanted: float(name != wanted))
        assert automatic_method(task) == wanted
    model.train().gradient_checkpointing_enable()
    assert automatic_method(task) == "kept", "chunked would be cheapest, but a checkpointed model cannot do it"


def test_a_way_without_whole_gradients_is_never_chunked(monkeypatch):
    case = CASES["ragged"]
    task = GradientTask(build("qwen3"), case.batch(), case.units)
    for name in COSTS:  # however cheap it is
        monkeypatch.setitem(COSTS, name, lambda *_, name=name: float(name != "chunked"))
    assert automatic_method(task) == "chunked"
    assert automatic_method(task, ("kept", "truncated")) in ("kept", "truncated")
    assert TrainConfig(scope="tensor").step_gradient_method == "piecemeal"
    assert TrainConfig(scope="tensor", step_gradient="kept").step_gradient_method == "kept"
    for method in ("chunked", "recomputed"):
        with pytest.raises(UserError, match=f"{method} adds up whole gradients"):
            TrainConfig(scope="tensor", step_gradient=method)
    assert TrainConfig().step_gradient_method == "auto"
