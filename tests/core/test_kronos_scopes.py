"""Whole runs of KronosOpt against SSR algorithm 2 in dense numpy, in both scopes and with every allocation."""

import numpy as np
import pytest
import torch
from reference.allocations import ALLOCATIONS, disjoint, reusing, tensorwise
from reference.kronos import DenseKronos
from reference.questions import SHAPES, gradients_at, questions, unit_loss, units_of, weights
from torch.multiprocessing.reductions import StorageWeakRef

from ssrctl.core.bits import bits_to_indices
from ssrctl.core.budget import coordinates, step_budgets
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import plan_units

BUDGET, STEP_BUDGET, TOLERANCE = 0.4, 0.17, 0.2
CURVE = [1.0, 0.7, 0.45, 0.3]
RATES = {"embed": 0.05, "mix": 0.05, "none": 0.05, "gain": 0.3, "late": 0.3, "scale": 0.02, "unused": 0.02}


def protection(seed, density=0.2):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def build(seed, mask, **options):
    """Parameters in three groups of different rates, and their optimizer."""
    named = {name: torch.nn.Parameter(value) for name, value in weights(seed).items()}
    groups = [
        {"params": [(name, named[name]) for name in SHAPES if RATES[name] == rate], "lr": rate}
        for rate in (0.05, 0.3, 0.02)
    ]
    # As the optimizer numbers them: ties between tensors go to the first one.
    ordered = {name: parameter for group in groups for name, parameter in group["params"]}
    optimizer = KronosOpt(groups, lr=1.0, protected=BlockMask.from_dense(mask), **options)
    return ordered, optimizer


def reference_of(named, mask, clip, **options):
    return DenseKronos(
        {name: p.detach().numpy() for name, p in named.items()},
        RATES,
        {name: mask[name].numpy() for name in named},
        clip,
        **options,
    )


def train_question(optimizer, named, question):
    """As a trainer does it: plan the units, then a backward pass and a claim for each that has signal."""
    advantages = question[1]
    budgets = step_budgets(CURVE, max(map(len, advantages)), budget=BUDGET, max_step_budget=STEP_BUDGET, rule="paper")
    optimizer.begin_question()
    claimed = []
    for unit in plan_units(advantages, budgets, fuse_tol=TOLERANCE):
        if unit.has_signal:
            optimizer.begin_unit(coordinates(unit.budget, optimizer.num_unprotected))
            unit_loss(named, question, unit.steps).backward()
            claimed.append(optimizer.claim())
    return claimed


def reference_question(reference, question):
    planned = units_of(
        question,
        CURVE,
        budget=BUDGET,
        max_step_budget=STEP_BUDGET,
        tolerance=TOLERANCE,
        num_unprotected=reference.num_unprotected,
    )
    return reference.question([(gradients_at(reference.theta, question, steps), k) for steps, k in planned])


def same_sets(claimed, expected):
    for found, masks in zip(claimed, expected, strict=True):
        for name, mask in masks.items():
            ours = found[name].tolist() if name in found else []
            assert ours == np.flatnonzero(mask).tolist(), name


def run_both(seed, steps, clip, options, reference_options):
    mask = protection(seed + 1)
    named, optimizer = build(seed, mask, max_grad_norm=clip, **options)
    reference = reference_of(named, mask, clip, **reference_options)
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    for number in range(steps):
        for question in questions(seed * 1000 + number, count=1 + number % 3):
            same_sets(train_question(optimizer, named, question), reference_question(reference, question))
        stats = optimizer.step()
        norm, scale, count = reference.step()
        assert stats.grad_norm == pytest.approx(norm, rel=1e-12)  # float64, in another order of additions
        assert stats.clip_scale == pytest.approx(scale, rel=1e-12)
        assert stats.num_updated == count
        for name, parameter in named.items():
            assert parameter.detach().numpy().tobytes() == reference.theta[name].tobytes(), (number, name)
    for name, parameter in named.items():
        ever = bits_to_indices(optimizer.touched[name], parameter.numel())
        assert ever.tolist() == np.flatnonzero(reference.ever[name]).tolist()
        still = mask[name] | ~torch.from_numpy(reference.ever[name])
        assert torch.equal(parameter.detach()[still].view(torch.int32), start[name][still].view(torch.int32))
    return named, optimizer


def test_the_runs_below_have_what_they_are_meant_to_cover():
    groups = [question for number in range(50) for question in questions(7000 + number, 1 + number % 3)]
    lengths = [[len(row) for row in advantages] for _, advantages in groups]
    plans = [
        plan_units(advantages, [0.01] * 5, fuse_tol=TOLERANCE) for _, advantages in groups if any(map(len, advantages))
    ]
    assert sum(len(set(row)) > 1 for row in lengths) > 50  # ragged
    assert sum(len(unit.steps) > 1 for plan in plans for unit in plan) > 10  # fused
    assert sum(not unit.has_signal for plan in plans for unit in plan) > 5
    assert any(not any(unit.has_signal for unit in plan) for plan in plans)  # a question without any signal


@pytest.mark.parametrize(("clip", "steps"), [(0.5, 50), (0.0, 12)])
def test_runs_equal_algorithm_2_to_the_last_bit(clip, steps):
    named, _ = run_both(7, steps, clip, {}, {"allocate": disjoint})
    assert torch.equal(named["unused"], weights(7)["unused"])


@pytest.mark.parametrize("allocation", ["overlap", "pooled", "shuffled"])
def test_the_controls_equal_their_references_to_the_last_bit(allocation):
    run_both(11, 12, 0.5, {"allocation": allocation}, {"allocate": ALLOCATIONS[allocation]})


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_reuse_equals_its_reference_to_the_last_bit(factor):
    run_both(13, 15, 0.5, {"reuse_factor": factor}, {"allocate": reusing(factor)})


@pytest.mark.parametrize("rule", ["adam", "rms"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_rules_equal_dense_moments_over_many_steps(rule, scope):
    allocate = disjoint if scope == "global" else tensorwise(disjoint)
    run_both(17, 10, 0.5, {"update_rule": rule, "scope": scope}, {"rule": rule, "allocate": allocate})


@pytest.mark.parametrize(
    ("options", "allocate", "steps"),
    [
        ({}, disjoint, 50),
        ({"allocation": "overlap"}, ALLOCATIONS["overlap"], 12),
        ({"reuse_factor": 1.5}, reusing(1.5), 12),
    ],
    ids=["disjoint", "overlap", "reuse"],
)
def test_tensor_scope_equals_the_algorithm_on_each_tensor_alone(options, allocate, steps):
    run_both(19, steps, 0.5, {"scope": "tensor", **options}, {"allocate": tensorwise(allocate)})


def test_tensor_scope_frees_every_gradient_before_the_next_one_is_made():
    # Registered before the optimizer's own hooks, so they run just before each selection.
    named = {name: torch.nn.Parameter(value) for name, value in weights(3).items()}
    made: list[StorageWeakRef] = []
    alive: list[int] = []

    def watch(parameter):
        made.append(StorageWeakRef(parameter.grad.untyped_storage()))
        alive.append(sum(not gradient.expired() for gradient in made))
        assert [p.grad is not None for p in named.values()].count(True) == 1

    for parameter in named.values():
        parameter.register_post_accumulate_grad_hook(watch)
    optimizer = KronosOpt(named.items(), lr=0.1, scope="tensor", budget=0.5, max_step_budget=0.2)
    optimizer.begin_question(2)
    for steps in ([0, 1], [2, 3]):
        loss = unit_loss(named, ([np.arange(16).reshape(4, 4) % 9], [[1.0] * 4]), steps)
        loss.backward()
        del loss
        assert all(parameter.grad is None for parameter in named.values())
        assert all(gradient.expired() for gradient in made)
        optimizer.claim()
    assert alive == [1] * (4 + 5)  # the first unit does not read "late"


def test_tensor_scope_with_one_graph_that_is_kept_for_all_units():
    mask = protection(4)
    named, optimizer = build(3, mask, scope="tensor", max_grad_norm=0.0)
    reference = reference_of(named, mask, 0.0, allocate=tensorwise(disjoint))
    tokens, advantages = [np.arange(16).reshape(4, 4) % 9], [[0.5, -1.0, 2.0, 1.0]]
    table = {name: named[name] * 1.0 for name in named}  # one graph under all four losses
    losses = [unit_loss(table, (tokens, advantages), [step]) for step in range(4)]
    optimizer.begin_question()
    claimed = []
    for number, loss in enumerate(losses):
        optimizer.begin_unit(20)
        loss.backward(retain_graph=number < 3)
        claimed.append(optimizer.claim())
    units = [(gradients_at(reference.theta, (tokens, advantages), [step]), 20) for step in range(4)]
    same_sets(claimed, reference.question(units))
    optimizer.step()
    reference.step()
    for name, parameter in named.items():
        assert parameter.detach().numpy().tobytes() == reference.theta[name].tobytes()


def test_tensor_scope_rounds_every_share_down():
    named = {"w": torch.nn.Parameter(torch.zeros(70)), "v": torch.nn.Parameter(torch.zeros(30))}
    mask = BlockMask.from_indices({"w": (70,), "v": (30,)}, {"w": torch.arange(10)})
    optimizer = KronosOpt(named.items(), lr=0.1, scope="tensor", protected=mask)
    optimizer.begin_question()
    optimizer.begin_unit(10)
    (named["w"].sum() + named["v"].sum()).backward()
    chosen = optimizer.claim()
    assert chosen["w"].tolist() == list(range(10, 16))  # 10 * 60 // 90 = 6
    assert chosen["v"].tolist() == [0, 1, 2]  # 10 * 30 // 90 = 3


def two_tensors(**options):
    named = {"w": torch.nn.Parameter(torch.ones(8)), "v": torch.nn.Parameter(torch.ones(4))}
    return named, KronosOpt(named.items(), lr=1.0, scope="tensor", max_grad_norm=0.0, **options)


def test_tensor_scope_needs_k_before_the_backward_pass():
    named, optimizer = two_tensors()
    optimizer.begin_question()
    named["w"].sum().backward()
    with pytest.raises(RuntimeError, match=r"k must be known before backward\(\): begin_unit\(k\)"):
        optimizer.claim(2)
    optimizer.abandon_question()
    optimizer.begin_question([1.0])
    with pytest.raises(RuntimeError, match=r"found nothing that was selected during a backward pass\.$"):
        optimizer.claim()
    optimizer.begin_unit(6)
    named["w"].sum().backward()
    with pytest.raises(RuntimeError, match=r"claim\(5\) after a backward pass that selected for k = 6"):
        optimizer.claim(5)
    assert optimizer.claim(6)["w"].tolist() == [0, 1, 2, 3]  # 6 * 8 // 12


def test_tensor_scope_refuses_a_second_backward_pass_in_one_unit():
    named, optimizer = two_tensors()
    optimizer.begin_question()
    optimizer.begin_unit(6)
    named["w"].sum().backward()
    with pytest.raises(RuntimeError, match="w got a second gradient in one unit"):
        named["w"].sum().backward()


def test_tensor_scope_refuses_a_nan_inside_the_backward_pass_and_can_go_on():
    named, optimizer = two_tensors()
    optimizer.begin_question()
    optimizer.begin_unit(3)
    (named["w"] * 2).sum().backward()
    optimizer.claim()
    optimizer.end_question()
    optimizer.begin_question()
    optimizer.begin_unit(6)
    with pytest.raises(NonFiniteGradient, match="the gradient of v has 4 values"):
        (named["w"].sum() + (named["v"] * float("nan")).sum()).backward()
    optimizer.abandon_question()
    assert named["w"].grad is None
    assert named["v"].grad is None
    optimizer.begin_question()
    optimizer.begin_unit(3)
    named["v"].sum().backward()
    optimizer.claim()
    optimizer.step()
    assert named["w"].tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # 3 * 8 // 12
    assert named["v"].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_hooks_are_silent_outside_of_questions_and_after_the_optimizer_is_gone():
    named, optimizer = two_tensors()
    named["w"].sum().backward()
    assert named["w"].grad.tolist() == [1.0] * 8
    optimizer.zero_grad()
    optimizer.begin_question(1)
    del optimizer
    named["w"].sum().backward()
    assert named["w"].grad.tolist() == [1.0] * 8


def test_two_optimizers_with_open_questions_on_one_model_are_refused():
    named, first = two_tensors()
    second = KronosOpt(named.items(), lr=1.0, scope="tensor")
    for optimizer in (first, second):
        optimizer.begin_question()
        optimizer.begin_unit(6)
    with pytest.raises(RuntimeError, match="the gradient of w is gone: has another optimizer a question open"):
        named["w"].sum().backward()
    first.abandon_question()
    named["w"].sum().backward()
    assert second.claim()["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("allocation", ["pooled", "shuffled"])
def test_tensor_scope_refuses_allocations_that_need_whole_gradients(allocation):
    with pytest.raises(ValueError, match=f"allocation '{allocation}' needs whole gradients"):
        two_tensors(allocation=allocation)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_frozen_parameters_are_left_alone(scope):
    named = {"w": torch.nn.Parameter(torch.ones(8)), "f": torch.nn.Parameter(torch.ones(4), requires_grad=False)}
    optimizer = KronosOpt(named.items(), lr=1.0, scope=scope, max_grad_norm=0.0)
    optimizer.begin_question()
    optimizer.begin_unit(3)
    (named["w"] * named["f"].sum()).sum().backward()
    optimizer.claim()
    optimizer.step()
    assert named["f"].tolist() == [1.0] * 4
    assert optimizer.num_unprotected == 8  # a frozen coordinate cannot be claimed, so it is no part of a budget
    assert named["w"].tolist() == [-3.0] * 3 + [1.0] * 5
