"""From per-unit gradients to updated weights: KronosOpt's driver and dense AdamW."""

import itertools
import math

import pytest
import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import Unit
from ssrctl.models.gradients import UnitGradient
from ssrctl.models.updaters import UPDATERS, AdamWUpdater, KronosUpdater, cosine_matrix

SHAPES = {"w": (6, 10), "v": (20,), "s": ()}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def protect(*indices):
    return BlockMask.from_indices(SHAPES, {"w": torch.tensor(indices, dtype=torch.int64)})


def gradients(named, seed, budgets, *, broken_at=None):
    """As ``unit_gradients`` does it: before each unit is handed over, the parameters hold its gradient."""
    generator = torch.Generator().manual_seed(seed)
    for number, budget in enumerate(budgets):
        for parameter in named.values():
            fresh = torch.randn(parameter.shape, generator=generator)
            if number == broken_at:
                fresh.view(-1)[0] = float("nan")
            parameter.grad = fresh if parameter.grad is None else parameter.grad + fresh
        yield UnitGradient(Unit((number,), budget, ((1.0,),)), 0.5, 3, 1)


def dense(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def bits(named):
    return {name: parameter.detach().view(-1).view(torch.int32).tolist() for name, parameter in named.items()}


def run(updater, named, steps, first_seed=0):
    for number in range(steps):
        for question in range(2):
            updater.add_question(gradients(named, first_seed + 10 * number + question, [0.1, 0.2]))
        updater.step()


@pytest.mark.parametrize(("kind", "decay"), [("kronos", 0.0), ("adamw", 0.0), ("adamw", 0.1)])
def test_protected_coordinates_keep_every_bit(kind, decay):
    named = parameters()
    start = bits(named)
    config = TrainConfig(optimizer=kind, learning_rate=0.1, weight_decay=decay)
    updater = UPDATERS[kind](list(named.items()), config, protect(0, 7, 59))
    assert updater.num_protected == 3
    run(updater, named, 5)
    now = bits(named)
    assert [now["w"][i] for i in (0, 7, 59)] == [start["w"][i] for i in (0, 7, 59)]
    assert sum(a != b for name in SHAPES for a, b in zip(start[name], now[name], strict=True)) > 40


@pytest.mark.parametrize("kind", ["kronos", "adamw"])
def test_changes_are_what_differs_from_the_start(kind):
    named = parameters()
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    updater = UPDATERS[kind](list(named.items()), TrainConfig(optimizer=kind), protect(3))
    assert updater.changes() == {}
    run(updater, named, 2)
    changes = updater.changes()
    rebuilt = {name: tensor.clone() for name, tensor in start.items()}
    for name, (indices, values) in changes.items():
        assert bool((indices.diff() > 0).all())
        rebuilt[name].view(-1)[indices] = values
    assert bits(rebuilt) == bits(named)
    assert 3 not in changes["w"][0].tolist()


@pytest.mark.parametrize("kind", ["kronos", "adamw"])
def test_a_restored_updater_goes_on_bit_for_bit(kind):
    config = TrainConfig(optimizer=kind, learning_rate=0.01, weight_decay=0.1 if kind == "adamw" else 0.0)
    whole = parameters()
    updater = UPDATERS[kind](list(whole.items()), config, protect(3))
    run(updater, whole, 2)
    saved = {name: tensor.clone() for name, tensor in updater.state().items()}
    weights = {name: parameter.detach().clone() for name, parameter in whole.items()}
    run(updater, whole, 2, first_seed=100)

    resumed = parameters()
    again = UPDATERS[kind](list(resumed.items()), config, protect(3))  # made over the base, as in training
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
    first = UPDATERS[kind](list(clean.items()), config, None)
    second = UPDATERS[kind](list(mixed.items()), config, None)
    first.add_question(gradients(clean, 1, [0.1, 0.1]))
    second.add_question(gradients(mixed, 1, [0.1, 0.1]))
    with pytest.raises(NonFiniteGradient):
        second.add_question(gradients(mixed, 2, [0.1, 0.1, 0.1], broken_at=2))
    assert all(parameter.grad is None for parameter in mixed.values())
    first.step()
    second.step()
    assert bits(clean) == bits(mixed)


def test_kronos_claims_the_granted_share_of_what_is_not_protected():
    named = parameters()
    updater = KronosUpdater(list(named.items()), TrainConfig(), protect(*range(21)))
    made = updater.add_question(gradients(named, 0, [0.1, 0.05, 0.001]))
    assert made.granted == [6, 3, 0]  # of 60 unprotected coordinates
    sizes = [sum(indices.numel() for indices in chosen.values()) for chosen in made.selected]
    assert sizes == [6, 3, 0]
    for a, b in itertools.combinations(made.selected, 2):
        for name in a.keys() & b.keys():
            assert not set(a[name].tolist()) & set(b[name].tolist())
    assert [g.loss for g in made.gradients] == [0.5] * 3
    metrics = updater.step()
    assert metrics["updated_frac"] == 9 / 81


def test_kronos_leaves_out_units_without_signal():
    silent, loud = Unit((0,), 0.1, ((0.0, None),)), Unit((1,), 0.1, ((0.0, -0.1),))
    updater = KronosUpdater(list(parameters().items()), TrainConfig(), None)
    assert updater.plan([silent, loud, silent]) == [loud]


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
            updater.add_question(gradients(named, seed, [0.1]))
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
    updater.add_question(gradients(named, 9, [0.1]))
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


def test_cosines_are_those_of_the_whole_gradients():
    made = dense(3, 3)
    del made[1]["v"]
    flat = [torch.cat([g.get(n, torch.zeros(SHAPES[n])).double().flatten() for n in SHAPES]) for g in made]
    found = cosine_matrix(made)
    for i, j in itertools.product(range(3), repeat=2):
        expected = float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))
        assert found[i][j] == pytest.approx(expected, abs=1e-12)
    assert found[0][0] == pytest.approx(1.0, abs=1e-15)


def test_cosine_with_a_zero_gradient_is_zero():
    assert cosine_matrix([{"w": torch.zeros(3)}, {"w": torch.ones(3)}]) == [[0.0, 0.0], [0.0, 1.0]]
    assert cosine_matrix([]) == []


def test_kronos_logs_cosines_of_gradients_before_masking():
    named = parameters()
    updater = KronosUpdater(list(named.items()), TrainConfig(), None)
    made = updater.add_question(gradients(named, 5, [0.01, 0.01]), with_cosine=True)
    expected = cosine_matrix(dense(5, 2))
    assert made.cosine == expected
    assert updater.add_question(gradients(named, 5, [0.01])).cosine is None
