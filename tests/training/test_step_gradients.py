"""Every way to a unit's gradient, against one response at a time with no batch, cache or chunk.

In float64 the ways differ by round-off of about 1e-15 per operation; the models are small, and 1e-9 of a
tensor's largest entry leaves room for thousands of operations while a token left out would show in the second
digit.
"""

import copy
import gc
import random
import types

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.unit_gradients import (
    CASES,
    Case,
    ConstantPast,
    alone,
    assert_close,
    build,
    expected_gradient,
    found_gradients,
    local_expected,
    taken,
)

from ssrctl.core.units import Unit, plan_units
from ssrctl.training.step_gradients import chunked
from ssrctl.training.step_gradients.shape import group_shape
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import GradientTask, compare_methods, unit_gradients

EXACT = ("kept", "truncated", "chunked", "recomputed")
LEVELS = ("token", "step", "sequence")


@pytest.fixture(scope="module", params=["qwen3", "llama", "gpt2", "opt", "mistral", "gemma3"])
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


@pytest.fixture
def every_cut(monkeypatch):
    """A chunk for every unit and one for the prompt, which the cost model would not make of so few tokens."""

    def boundaries(shape, costs):
        return sorted({shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)})

    monkeypatch.setattr(chunked, "plan_boundaries", boundaries)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_gradients_are_those_of_each_response_alone(qwen, every_cut, case, method):
    case = case.near(qwen)
    found = found_gradients(qwen, case, method, dials=Dials(2, 2))
    assert [unit for unit, _ in found] == case.units
    for unit, gradient in found:
        assert_close(gradient, expected_gradient(qwen, case, unit, "sequence"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", EXACT)
def test_every_kind_of_model_and_ratio(any_model, every_cut, method, level):
    case = CASES["ragged"].near(any_model)
    for unit, gradient in found_gradients(any_model, case, method, level, dials=Dials(1, 8)):
        assert_close(gradient, expected_gradient(any_model, case, unit, level))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_eager_attention(every_cut, kind, method):
    model = build(kind, attn_implementation="eager")
    case = CASES["fused"].near(model)
    for unit, gradient in found_gradients(model, case, method):
        # its softmax is computed in float32 whatever the model's precision
        assert_close(gradient, expected_gradient(model, case, unit, "sequence"), tolerance=1e-5)


@st.composite
def random_cases(draw):
    seed = draw(st.integers(0, 10**6))
    chance = random.Random(seed)
    rows = chance.randint(1, 4)
    steps = [[s for s in range(chance.randint(1, 5)) for _ in range(chance.randint(0, 3))] or [0] for _ in range(rows)]
    advantages = [[chance.choice([None, 0.0, chance.uniform(-1, 1)]) for _ in range(6)] for _ in range(rows)]
    advantages[0][steps[0][0]] = 1.3  # something to learn
    units = plan_units(advantages, [0.01] * 6, fuse_tol=chance.choice([0.0, 0.8]))
    groups = [unit.steps for unit in units if unit.has_signal]
    cuts = chance.random()
    return Case(steps, advantages, groups, prompt_length=chance.randint(1, 4), seed=seed), cuts


@given(random_cases(), st.sampled_from(LEVELS))
@settings(max_examples=25)
def test_the_exact_ways_agree_wherever_the_chunks_are_cut(qwen, drawn, level):
    case, share = drawn
    case = case.near(qwen)

    def boundaries(shape, costs):
        cuts = sorted({shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)})
        return [c for number, c in enumerate(cuts) if c == cuts[-1] or (number * 0.618) % 1 < share]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "plan_boundaries", boundaries)
        dials = Dials(1 + len(case.units) % 3, [2, 7, None][case.prompt[0] % 3])
        found = {method: found_gradients(qwen, case, method, level, dials=dials) for method in EXACT}
    kept = found.pop("kept")
    for other in found.values():
        for (unit, mine), (same, expected) in zip(other, kept, strict=True):
            assert unit == same
            assert_close(mine, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_local_takes_earlier_keys_and_values_as_constants(case):
    model = build("qwen3")
    case = case.near(model)
    found = found_gradients(model, case, "local")
    transformers.AttentionInterface.register("constant_past", ConstantPast.attend)
    model.set_attn_implementation("constant_past")
    for unit, gradient in found:
        assert_close(gradient, local_expected(model, case, case.units, unit))
    assert len(found) == len(case.units)


def test_local_is_exact_for_the_first_unit_and_not_for_later_ones(qwen):
    case = CASES["ragged"].near(qwen)
    cosines = compare_methods(qwen, case.batch(), case.units, "kept", "local")
    assert cosines[0] == pytest.approx(1.0, abs=1e-12)
    assert all(0.1 < cosine < 0.99 for cosine in cosines[1:])
    joined = [Unit((0, 1, 2), 0.01, tuple(column for unit in case.units for column in unit.advantages))]
    assert compare_methods(qwen, case.batch(), joined, "kept", "local") == [pytest.approx(1.0, abs=1e-12)]


def test_no_tokens_are_run_that_no_unit_needs(qwen, every_cut, monkeypatch):
    """The tail of 'gaps and a tail' stays out when neither the ratio nor anyone else asks for it."""
    case, seen = CASES["gaps and a tail"].near(qwen), []
    whole = qwen.forward

    def forward(*args, input_ids, past_key_values=None, use_cache=None, attention_mask=None, logits_to_keep=0):
        seen.append((tuple(input_ids.shape), logits_to_keep))
        return whole(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
        )

    monkeypatch.setattr(qwen, "forward", forward)
    # units end after 1 (2), 5 (4) and 6 (6) tokens, the prompt has 3, and the last token is no input
    found_gradients(qwen, case, "truncated", "token")
    assert seen == [((2, 4), 2), ((2, 7), 5), ((2, 8), 6)]
    seen.clear()
    found_gradients(qwen, case, "chunked", "token")
    assert seen == [((1, 3), 1), ((2, 1), 1), ((2, 3), 3), ((2, 1), 1)]
    seen.clear()
    found_gradients(qwen, case, "chunked", "sequence")
    assert seen == [((1, 3), 1), ((2, 1), 1), ((2, 3), 3), ((2, 1), 1), ((2, 3), 3)]


def test_rows_that_have_ended_are_not_run(qwen, every_cut, monkeypatch):
    case, seen = CASES["one token and more"].near(qwen), []
    whole = qwen.forward

    def forward(input_ids, past_key_values=None, use_cache=None, attention_mask=None, position_ids=None):
        seen.append(tuple(input_ids.shape))
        return whole(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )

    found_gradients(qwen, case, "chunked")  # the first use of a model reads how its head scales, by a pass of its own
    monkeypatch.setattr(qwen, "forward", forward)
    for method in ("chunked", "local"):
        seen.clear()
        found_gradients(qwen, case, method)
        assert seen == [(1, 3), (2, 1), (1, 1)]


def test_recomputed_runs_each_response_again_up_to_its_own_last_token(qwen, every_cut, monkeypatch):
    case, seen = copy.copy(CASES["late start"]), []
    with torch.no_grad():  # nothing is clipped
        case.old = [alone(qwen, case.prompt, response).tolist() for response in case.responses]
    whole = qwen.forward

    def forward(input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        seen.append((torch.is_grad_enabled(), past_key_values.get_seq_length(), tuple(input_ids.shape)))
        return whole(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
        )

    found_gradients(qwen, case, "chunked")  # the first use of a model runs it once more
    monkeypatch.setattr(qwen, "forward", forward)
    found_gradients(qwen, case, "recomputed", "token", dials=Dials(1, 2))
    prompt = [(1, (1, 2)), (0, (1, 1))]
    assert [call[1:] for call in seen if call[0]] == [
        *[(3, (1, 1)), *prompt],  # the first unit: a token of the first response, and those that the prompt predicts
        *[(4, (1, 2)), (3, (1, 1)), (3, (1, 2)), (3, (1, 1)), *prompt],
    ]


def test_units_at_once_end_their_chunks_where_that_pays(qwen, every_cut, monkeypatch):
    case = CASES["ragged"].near(qwen)  # units end after 3, 6 and 8 tokens of a response
    task = GradientTask(qwen, case.batch(), case.units)
    run = types.SimpleNamespace(batch=task.batch, shared=3, order=torch.tensor([0, 2, 1]), chunks=[])
    wanted = torch.zeros(2, 3, 8, dtype=torch.bool)
    wanted[0, 0, 2], wanted[1, 0, 7], wanted[1, 2, 5] = True, True, True

    def cuts(most):
        return [[(c.start, c.stop) for c in block] for block in chunked.row_blocks(run, wanted, most, None)]

    assert cuts(4) == [
        [(3, 5), (5, 7), (7, 10)],
        [(3, 5), (5, 8)],
    ]  # chunks of at most 4 tokens; the first unit stops at 5
    assert cuts(100) == [[(3, 5), (5, 10)]]  # both responses in one block
    monkeypatch.setattr(chunked, "plan_boundaries", lambda shape, costs: [max(map(shape.input_end, shape.lengths))])
    assert cuts(100) == [[(3, 10)]]


@pytest.mark.parametrize("method", [*EXACT, "local", "auto"])
@pytest.mark.parametrize("level", LEVELS)
def test_all_log_probabilities_are_reported_before_the_first_unit(qwen, every_cut, method, level):
    case, events = CASES["gaps and a tail"].near(qwen), []
    made = unit_gradients(
        qwen,
        case.batch(),
        case.units,
        method=method,
        level=level,
        on_logprobs=lambda logprobs: events.append(logprobs),
        on_unit=lambda unit: events.append((unit, not taken(qwen))),
    )
    for number, gradient in enumerate(made, start=1):
        assert len(events) == 1 + number and events[-1] == (gradient.unit, True), "not told before the backward pass"
        assert taken(qwen)
    assert not events[0].requires_grad and events[0].shape == (2, 9)
    for row, response in enumerate(case.responses):
        with torch.no_grad():
            expected = alone(qwen, case.prompt, response)
        torch.testing.assert_close(events[0][row, : len(response)], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", EXACT)
def test_counts_and_losses_agree(qwen, every_cut, method):
    case = CASES["ragged"].near(qwen)
    kept = [*unit_gradients(qwen, case.batch(), case.units, level="token", method="kept")]
    found = [*unit_gradients(qwen, case.batch(), case.units, level="token", method=method, loss_scale=0.25)]
    taken(qwen)
    assert [(m.num_terms, m.num_clipped) for m in found] == [(m.num_terms, m.num_clipped) for m in kept]
    assert sum(m.num_clipped for m in found) > 0
    assert [m.loss for m in found] == pytest.approx([m.loss for m in kept], abs=1e-12)
    scaled = found_gradients(qwen, case, method, "token", loss_scale=0.25)
    for (_, quarter), (_, whole) in zip(scaled, found_gradients(qwen, case, "kept", "token"), strict=True):
        assert_close({name: 4 * gradient for name, gradient in quarter.items()}, whole)


def test_the_shape_of_a_task(qwen):
    case = CASES["ragged"]
    shape = group_shape(GradientTask(qwen, case.batch(), case.units))
    assert (shape.prompt_length, shape.lengths, shape.width) == (3, (8, 4, 6), 8)
    # unit 0 has no score in the third response, unit 2 no tokens in the second
    assert [(u.start, u.end, u.num_rows) for u in shape.units] == [(0, 3, 2), (1, 6, 3), (3, 8, 2)]
    assert [shape.rows_beyond(column) for column in (0, 5, 6, 7, 8, 9, 10)] == [3, 3, 2, 2, 1, 1, 0]


def test_no_graph_survives_its_backward_pass(qwen, every_cut):
    """An attention output that its own graph had saved would keep all activations of its chunk."""
    case = CASES["ragged"].near(qwen)

    def outputs():
        gc.collect()
        held = (each.grad_fn for each in gc.get_objects() if type(each) is torch.Tensor)
        return sum("ScaledDotProduct" in type(function).__name__ for function in held)

    before = outputs()
    found_gradients(qwen, case, "recomputed")
    assert outputs() == before
