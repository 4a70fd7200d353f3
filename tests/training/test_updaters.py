"""From per-unit gradients to updated weights: KronosOpt's driver and dense AdamW."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import Unit
from ssrctl.training.unit_gradients import UnitGradient
from ssrctl.training.updaters import make_updater
from ssrctl.training.updaters.adamw import AdamWUpdater
from ssrctl.training.updaters.kronos import KronosUpdater

SHAPES = {"w": (6, 10), "v": (20,), "s": ()}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def protect(*indices):
    return BlockMask.from_indices(SHAPES, {"w": torch.tensor(indices, dtype=torch.int64)})


def gradients(updater, named, seed, budgets, *, broken_at=None):
    """As ``unit_gradients`` does it: the updater hears of each unit, then the parameters hold its gradient."""
    generator = torch.Generator().manual_seed(seed)
    for number, budget in enumerate(budgets):
        unit = Unit((number,), budget, ((1.0,),))
        updater.before_unit(unit)
        for parameter in named.values():
            fresh = torch.randn(parameter.shape, generator=generator)
            if number == broken_at:
                fresh.view(-1)[0] = float("nan")
            parameter.grad = fresh if parameter.grad is None else parameter.grad + fresh
        yield UnitGradient(unit, 0.5, 3, 1)


def dense(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def bits(named):
    return {name: parameter.detach().view(-1).view(torch.int32).tolist() for name, parameter in named.items()}


def run(updater, named, steps, first_seed=0):
    for number in range(steps):
        for question in range(2):
            updater.add_question(gradients(updater, named, first_seed + 10 * number + question, [0.1, 0.2]))
        updater.step()


KINDS = {
    "sgd": {"optimizer": "kronos"},
    "adam": {"optimizer": "kronos", "update_rule": "adam"},
    "rms": {"optimizer": "kronos", "update_rule": "rms"},
    "adamw": {"optimizer": "adamw"},
    "decay": {"optimizer": "adamw", "weight_decay": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_protected_coordinates_keep_every_bit(kind):
    named = parameters()
    start = bits(named)
    config = TrainConfig(**KINDS[kind], learning_rate=0.1)
    updater = make_updater(list(named.items()), config, protect(0, 7, 59))
    assert updater.num_protected == 3
    run(updater, named, 5)
    now = bits(named)
    assert [now["w"][i] for i in (0, 7, 59)] == [start["w"][i] for i in (0, 7, 59)]
    assert sum(a != b for name in SHAPES for a, b in zip(start[name], now[name], strict=True)) > 40


MASK = BlockMask.from_indices(SHAPES, {"w": torch.arange(0, 60, 2), "s": torch.tensor([0])})


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"optimizer": "kronos", "max_step_budget": 0.2}])
def test_a_mask_trains_its_coordinates_alone(settings):
    named = parameters()
    start = bits(named)
    config = TrainConfig(mask=Path("m.safetensors"), learning_rate=0.1, **settings)
    updater = make_updater(list(named.items()), config, protect(0, 7), MASK)
    assert updater.num_protected == 81 - 30
    run(updater, named, 5)
    now = bits(named)
    moved = {n: [i for i, (a, b) in enumerate(zip(start[n], now[n], strict=True)) if a != b] for n in SHAPES}
    assert moved["v"] == [] and set(moved["w"]) <= set(range(2, 60, 2)) and len(moved["w"]) > 15
    assert set(updater.changes()) == {"w", "s"}


def test_a_mask_of_everything_is_adamw():
    whole, masked = parameters(), parameters()
    config = {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0}
    everything = BlockMask.from_dense({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    first = make_updater(list(whole.items()), TrainConfig(optimizer="adamw", **config))
    second = make_updater(list(masked.items()), TrainConfig(mask=Path("m"), **config), None, everything)
    run(first, whole, 4)
    run(second, masked, 4)
    for name in SHAPES:  # the norms of the clip are summed in float32 by one and in float64 by the other
        torch.testing.assert_close(whole[name].detach(), masked[name].detach(), rtol=1e-5, atol=1e-7)


def test_only_the_masked_gradient_is_clipped():
    named = parameters()
    updater = make_updater(list(named.items()), TrainConfig(mask=Path("m")), None, MASK)
    updater.add_question(gradients(updater, named, 9, [0.1]))
    given = dense(9, 1)[0]
    square = float(given["w"].view(-1)[::2].double().square().sum()) + float(given["s"].double().square())
    assert updater.step()["grad_norm"] == pytest.approx(math.sqrt(square), rel=1e-12)


@pytest.mark.parametrize("kind", ["kronos", "adamw"])
def test_changes_are_what_differs_from_the_start(kind):
    named = parameters()
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    updater = make_updater(list(named.items()), TrainConfig(optimizer=kind), protect(3))
    assert updater.changes() == {}
    run(updater, named, 2)
    changes = updater.changes()
    rebuilt = {name: tensor.clone() for name, tensor in start.items()}
    for name, (indices, values) in changes.items():
        assert bool((indices.diff() > 0).all())
        rebuilt[name].view(-1)[indices] = values
    assert bits(rebuilt) == bits(named)
    assert 3 not in changes["w"][0].tolist()


@pytest.mark.parametrize("kind", [*KINDS, "mask"])
def test_a_restored_updater_goes_on_bit_for_bit(kind):
    config = TrainConfig(**KINDS.get(kind, {"mask": Path("m")}), learning_rate=0.01)
    mask = MASK if kind == "mask" else None
    whole = parameters()
    updater = make_updater(list(whole.items()), config, protect(3), mask)
    run(updater, whole, 2)
    saved = {name: tensor.clone() for name, tensor in updater.state().items()}
    weights = {name: parameter.detach().clone() for name, parameter in whole.items()}
    run(updater, whole, 2, first_seed=100)

    resumed = parameters()
    again = make_updater(list(resumed.items()), config, protect(3), mask)  # made over the base, as in training
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(weights[name])
    again.load_state(saved)
    run(again, resumed, 2, first_seed=100)
    assert bits(resumed) == bits(whole)
    mine, theirs = updater.changes(), again.changes()
    assert {n: i.tolist() for n, (i, _) in mine.items()} == {n: i.tolist() for n, (i, _) in theirs.items()}


@pytest.mark.parametrize("kind", ["kronos", "adamw"])
def test_a_question_with_a_nan_leaves_nothing_behind(kind):
    config = TrainConfig(optimizer=kind)
    clean, mixed = parameters(), parameters()
    first = make_updater(list(clean.items()), config, None)
    second = make_updater(list(mixed.items()), config, None)
    first.add_question(gradients(first, clean, 1, [0.1, 0.1]))
    second.add_question(gradients(second, mixed, 1, [0.1, 0.1]))
    with pytest.raises(NonFiniteGradient):
        second.add_question(gradients(second, mixed, 2, [0.1, 0.1, 0.1], broken_at=2))
    assert all(parameter.grad is None for parameter in mixed.values())
    first.step()
    second.step()
    assert bits(clean) == bits(mixed)


def test_kronos_claims_the_granted_share_of_what_is_not_protected():
    named = parameters()
    updater = KronosUpdater(list(named.items()), TrainConfig(), protect(*range(21)))
    made = updater.add_question(gradients(updater, named, 0, [0.1, 0.05, 0.001]))
    assert made.granted == [6, 3, 0]  # of 60 unprotected coordinates
    assert [unit.count for unit in made.kept] == [6, 3, 0]
    for a, b in itertools.combinations(made.kept, 2):
        for name in a.sets.keys() & b.sets.keys():
            assert not set(a.sets[name].to_indices().tolist()) & set(b.sets[name].to_indices().tolist())
    assert [g.loss for g in made.gradients] == [0.5] * 3
    metrics = updater.step()
    assert metrics["updated_frac"] == 9 / 81


def test_kronos_leaves_out_units_without_signal():
    silent, loud = Unit((0,), 0.1, ((0.0, None),)), Unit((1,), 0.1, ((0.0, -0.1),))
    updater = KronosUpdater(list(parameters().items()), TrainConfig(), None)
    assert updater.plan([silent, loud, silent]) == [loud]


def test_scope_tensor_is_told_k_before_the_backward_pass():
    parameter = torch.nn.Parameter(torch.arange(10.0))
    updater = KronosUpdater([("w", parameter)], TrainConfig(scope="tensor"), None)

    def backward():
        for number in (0, 1):
            unit = Unit((number,), 0.2, ((1.0,),))
            updater.before_unit(unit)
            parameter.square().sum().backward()
            assert parameter.grad is None
            yield UnitGradient(unit, 0.5, 3, 1)

    made = updater.add_question(backward())
    assert [unit.sets["w"].to_indices().tolist() for unit in made.kept] == [[8, 9], [6, 7]]


def test_the_pooled_control_is_one_unit():
    first, second = Unit((0,), 0.1, ((1.0,),)), Unit((1,), 0.2, ((-1.0,),))
    updater = KronosUpdater(list(parameters().items()), TrainConfig(allocation="pooled"), None)
    (unit,) = updater.plan([first, second])
    assert unit.steps == (0, 1) and unit.budget == pytest.approx(0.3)
    assert updater.plan([Unit((0,), 0.1, ((0.0,),))]) == []


def test_adamw_takes_all_steps_at_once():
    first, second = Unit((0, 1), 0.1, ((1.0,), (0.0,))), Unit((2,), 0.2, ((None,),))
    updater = AdamWUpdater(list(parameters().items()), TrainConfig(optimizer="adamw"), None)
    (unit,) = updater.plan([first, second])
    assert (unit.steps, unit.advantages) == ((0, 1, 2), ((1.0,), (0.0,), (None,)))
    assert updater.plan([second]) == []


def test_adamw_follows_the_textbook():
    """Two questions a step, summed, clipped; decoupled decay; Kingma and Ba's bias correction, in float64."""
    named = parameters()
    rate, decay, limit, beta1, beta2, eps = 0.01, 0.1, 1.0, 0.9, 0.999, 1e-8
    config = TrainConfig(optimizer="adamw", learning_rate=rate, weight_decay=decay, max_grad_norm=limit)
    updater = AdamWUpdater(list(named.items()), config, None)
    theta = {name: parameter.detach().double().clone() for name, parameter in named.items()}
    m = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    v = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in (1, 2, 3):
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for seed in (2 * step, 2 * step + 1):
            updater.add_question(gradients(updater, named, seed, [0.1]))
            for name, gradient in dense(seed, 1)[0].items():
                total[name] += gradient.double()
        norm = math.sqrt(sum(float(g.square().sum()) for g in total.values()))
        metrics = updater.step()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)  # float32 sums of 81 squares
        assert metrics["clip_scale"] == pytest.approx(limit / norm, rel=1e-5)
        for name, gradient in total.items():
            g = gradient * limit / norm
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            theta[name] -= rate * decay * theta[name]
            theta[name] -= rate * (m[name] / (1 - beta1**step)) / ((v[name] / (1 - beta2**step)).sqrt() + eps)
            # float32 with updates of 0.01 a step, and a clip whose denominator torch enlarges by 1e-6
            torch.testing.assert_close(named[name].detach().double(), theta[name], rtol=0, atol=1e-6)


def test_adamw_clips_by_what_may_move():
    """A protected weight often has the largest gradient; it must not shrink everybody else's step."""
    named = parameters()
    updater = AdamWUpdater(list(named.items()), TrainConfig(optimizer="adamw"), protect(3))
    updater.add_question(gradients(updater, named, 9, [0.1]))
    expected = dense(9, 1)[0]
    expected["w"].view(-1)[3] = 0.0
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert updater.step()["grad_norm"] == pytest.approx(norm, rel=1e-6)  # float32 sums of 81 squares


def test_adamw_without_a_question_changes_nothing():
    named = parameters()
    start = bits(named)
    updater = AdamWUpdater(list(named.items()), TrainConfig(optimizer="adamw", weight_decay=0.1), None)
    assert updater.step() == {"grad_norm": 0.0, "clip_scale": 1.0, "updated_frac": 0.0}
    assert bits(named) == start


def halves(seed=0):
    return {name: torch.nn.Parameter(parameter.detach().bfloat16()) for name, parameter in parameters(seed).items()}


def test_adamw_keeps_masters_of_bfloat16_weights_and_logs_what_would_be_lost():
    """The same small steps: with masters they add up to the float32 run's, without them most are lost."""
    moved = {}
    for kind, settings in {"masters": {}, "none": {"master_weights": False}, "float32": {}}.items():
        named = halves()
        start = {name: parameter.detach().clone().float() for name, parameter in named.items()}
        if kind == "float32":
            named = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        updater = make_updater(
            list(named.items()), TrainConfig(optimizer="adamw", learning_rate=1e-4, **settings), protect(3)
        )
        for _ in range(200):
            for name, parameter in named.items():
                parameter.grad = torch.ones(SHAPES[name], dtype=parameter.dtype)
            updater.sum = {name: parameter.grad for name, parameter in named.items()}
            row = updater.step()
        assert ("lost_update_frac" in row) == (kind == "masters")
        moved[kind] = sum(float((p.detach().float() - start[name]).square().sum()) for name, p in named.items()) ** 0.5
        assert named["w"].detach().view(-1)[3] == start["w"].view(-1)[3]
    assert 0.9 < moved["masters"] / moved["float32"] < 1.1
    assert moved["none"] < 0.5 * moved["float32"]


def test_protected_coordinates_with_masters_keep_every_bit_under_decay():
    named = halves()
    start = named["w"].detach().clone()
    config = TrainConfig(optimizer="adamw", learning_rate=1e-3, weight_decay=1.0)
    updater = make_updater(list(named.items()), config, protect(0, 7, 59))
    for _ in range(50):
        updater.sum = {name: torch.ones(SHAPES[name], dtype=torch.bfloat16) for name in named}
        row = updater.step()
    assert [float(named["w"].detach().view(-1)[i]) for i in (0, 7, 59)] == [
        float(start.view(-1)[i]) for i in (0, 7, 59)
    ]
    assert 0 < row["lost_update_frac"] <= 1
    again = halves()
    other = make_updater(list(again.items()), config, protect(0, 7, 59))
    other.load_state({name: value.clone() for name, value in updater.state().items()})
    assert other.state().keys() == updater.state().keys()
    assert all(torch.equal(value, other.state()[name]) for name, value in updater.state().items())


@pytest.mark.parametrize("masked", [False, True])
def test_a_sum_that_overflows_changes_no_weight(masked):
    named = parameters()
    before = bits(named)
    mask = protect(*range(10)) if masked else None
    config = TrainConfig(optimizer="adamw", mask=Path("mask.safetensors") if masked else None)
    updater = make_updater(list(named.items()), config, None, mask)
    updater.sum = {name: torch.full(SHAPES[name], float("inf")) for name in named}
    with pytest.raises(NonFiniteGradient, match="the gradient of w has 60 values"):
        updater.step()
    assert bits(named) == before and all(parameter.grad is None for parameter in named.values())
