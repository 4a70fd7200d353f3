"""Exact master values of half-precision weights: an fp32 shadow in numpy, bit for bit."""

import numpy as np
import pytest
import torch

from ssrctl.core.kronos import KronosOpt
from ssrctl.core.layout import Layout
from ssrctl.core.sparse_state import SparseState
from ssrctl.core.sparse_update import Survival, add_kept, apply_pending, pending_fields, state_fields
from ssrctl.core.update_rules import RULES, Hyper

F32 = np.float32
HALVES = [torch.bfloat16, torch.float16]


def bf16_of(values, *, ties_to_even):
    """float32 rounded to bf16, as float32, by comparing distances (exact in float64)."""
    values = np.asarray(values, dtype=F32)
    bits = values.view(np.uint32)
    below = (bits & np.uint32(0xFFFF0000)).view(F32)  # toward zero
    above = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(F32)
    down, up = np.abs(values.astype(float) - below), np.abs(above.astype(float) - values)
    tie = ((bits >> 16) & 1 == 1) if ties_to_even else np.True_
    return np.where((up < down) | ((up == down) & tie), above, below)


def stored(shadow, dtype):
    """What is written into the weight, as float32: nearest; ties away from zero in bf16, to even in fp16."""
    return bf16_of(shadow, ties_to_even=False) if dtype == torch.bfloat16 else shadow.astype(np.float16).astype(F32)


def rounded(values, dtype):
    """Ordinary storage rounding, as float32: nearest, ties to even."""
    return bf16_of(values, ties_to_even=True) if dtype == torch.bfloat16 else values.astype(np.float16).astype(F32)


def random_weights(dtype, numel, seed=0):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_once(optimizer, parameter, chosen, values):
    """A gradient that is zero but at ``chosen``."""
    optimizer.begin_question()
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[chosen] = values
    optimizer.claim(chosen.numel())
    return optimizer.step()


@pytest.mark.parametrize("dtype", HALVES)
def test_many_tiny_updates_add_up_as_in_fp32(dtype):
    numel, rng = 400, np.random.default_rng(0)
    parameter = torch.nn.Parameter(random_weights(dtype, numel))
    start = parameter.detach().clone()
    shadow = start.float().numpy().copy()
    ever = np.zeros(numel, dtype=bool)
    optimizer = KronosOpt([("w", parameter)], lr=1e-5, max_grad_norm=0.0)
    for number in range(300):
        chosen = np.sort(rng.choice(200, size=190, replace=False))  # the upper half is never touched
        # relative to the weight about 1e-5 per update, in one direction, so that it adds up
        values = (torch.from_numpy(-shadow[chosen]) * (0.5 + rng.random())).to(dtype)
        values[values == 0] = 1.0
        stats = step_once(optimizer, parameter, torch.from_numpy(chosen), values)
        before = stored(shadow, dtype)
        change = F32(1e-5) * values.float().numpy()
        plain = rounded(before[chosen] - change, dtype)
        assert stats.num_updated == 190
        assert stats.lost_frac == np.count_nonzero(plain == before[chosen]) / np.count_nonzero(change), number
        shadow[chosen] -= change
        ever[chosen] = True
        ours = parameter.detach()
        assert ours.float().numpy().tobytes() == stored(shadow, dtype).tobytes(), number
    assert stats.lost_frac > 0.9
    moved = ours != start
    assert int(moved.sum()) > 60
    assert torch.equal(
        ours[~torch.from_numpy(ever)].view(torch.int16), start[~torch.from_numpy(ever)].view(torch.int16)
    )
    assert ever[:200].all()


@pytest.mark.parametrize("dtype", HALVES)
def test_without_masters_tiny_updates_vanish(dtype):
    for masters, moves in ((False, False), (True, True)):
        parameter = torch.nn.Parameter(random_weights(dtype, 64).abs() + 0.5)
        start = parameter.detach().clone()
        optimizer = KronosOpt([("w", parameter)], lr=1e-5, max_grad_norm=0.0, master_weights=masters)
        for _ in range(220):
            stats = step_once(optimizer, parameter, torch.arange(64), torch.ones(64, dtype=dtype))
        assert stats.lost_frac == 1.0
        assert torch.equal(parameter.detach(), start) == (not moves)


@pytest.mark.parametrize("dtype", HALVES)
def test_without_masters_the_weight_is_rounded_every_time(dtype):
    rng = np.random.default_rng(1)
    parameter = torch.nn.Parameter(random_weights(dtype, 100))
    weight = parameter.detach().float().numpy().copy()
    optimizer = KronosOpt([("w", parameter)], lr=0.01, max_grad_norm=0.0, master_weights=False)
    for _ in range(20):
        values = torch.from_numpy(rng.standard_normal(100).astype(F32)).to(dtype)
        stats = step_once(optimizer, parameter, torch.arange(100), values)
        change = F32(0.01) * values.float().numpy()
        new = rounded(weight - change, dtype)
        assert stats.lost_frac == np.count_nonzero((new == weight) & (change != 0)) / np.count_nonzero(change)
        weight = new
        assert parameter.detach().float().numpy().tobytes() == weight.tobytes()


def test_what_fp32_swallows_is_counted_too():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    optimizer = KronosOpt([("w", parameter)], lr=1.0, max_grad_norm=0.0)
    stats = step_once(optimizer, parameter, torch.arange(4), torch.tensor([1e-9, 1e-3, 0.0, 1e-30]))
    assert stats.lost_frac == pytest.approx(1 / 3)  # of three intended ones the first


def test_nothing_intended_is_nothing_lost():
    assert Survival().lost_frac == 0.0
    assert (Survival(3, 2, 1, 1) + Survival(4, 2, 2, 3)) == Survival(7, 4, 3, 4)
    assert Survival(7, 4, 3).lost_frac == 0.75


@pytest.mark.parametrize("rule", RULES)
def test_fields_are_what_the_rule_and_the_dtype_need(rule):
    moments = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32} if rule == "adam" else {}
    assert state_fields(RULES[rule], torch.float32, masters=True) == moments
    assert state_fields(RULES[rule], torch.bfloat16, masters=True) == {**moments, "remainder": torch.int16}
    assert state_fields(RULES[rule], torch.float16, masters=True) == {**moments, "remainder": torch.float32}
    assert state_fields(RULES[rule], torch.bfloat16, masters=False) == moments
    assert set(pending_fields(RULES[rule])) == {"sum"} | ({"squares"} if rule == "adam" else set())


def test_kept_gradients_add_up_per_coordinate():
    pending = SparseState(100, pending_fields(RULES["adam"]))
    add_kept(pending, [(torch.tensor([3, 70]), torch.tensor([1.0, 2.0]))])
    add_kept(pending, [(torch.tensor([1, 70, 99]), torch.tensor([5.0, -3.0, 7.0]))])
    assert pending.indices().tolist() == [1, 3, 70, 99]
    assert pending.fields["sum"].tolist() == [5.0, 1.0, -1.0, 7.0]
    assert pending.fields["squares"].tolist() == [25.0, 1.0, 13.0, 49.0]


@pytest.mark.parametrize("shared", [False, True])
def test_units_that_come_together_add_up_as_one_after_the_other(shared):
    rng = np.random.default_rng(2)
    apart = np.split(rng.permutation(200), [60, 90])
    chosen = [rng.choice(200, 60, replace=False) for _ in range(3)] if shared else apart
    parts = [
        (torch.from_numpy(np.sort(indices)), torch.from_numpy(rng.standard_normal(indices.size).astype(F32)))
        for indices in chosen
    ]
    total, squares, taken = np.zeros(200, F32), np.zeros(200, F32), np.zeros(200, bool)
    for indices, values in parts:
        total[indices] += values.numpy()
        squares[indices] += values.numpy() ** 2
        taken[indices] = True
    pending = SparseState(200, pending_fields(RULES["adam"]))
    add_kept(pending, parts)
    assert pending.indices().tolist() == np.flatnonzero(taken).tolist()
    assert pending.fields["sum"].numpy().tobytes() == total[taken].tobytes()
    assert pending.fields["squares"].numpy().tobytes() == squares[taken].tobytes()


def test_only_the_waiting_coordinates_are_written():
    weight = torch.tensor([1.0, -0.0, 3.0, float("nan")], dtype=torch.bfloat16)
    layout = Layout({"w": weight}, align=64)
    state = SparseState(layout.size, state_fields(RULES["sgd"], torch.bfloat16, masters=True))
    pending = SparseState(layout.size, pending_fields(RULES["sgd"]))
    add_kept(pending, [(torch.tensor([2]), torch.tensor([4.0]))])
    moved = apply_pending({"w": weight}, layout, pending, state, RULES["sgd"], Hyper(), lr=0.5, clip_scale=0.25)
    assert moved == Survival(1, 1, 0, 1)
    assert weight[2] == 2.5
    assert weight[[0, 1]].view(torch.int16).tolist() == [0x3F80, -0x8000]
    assert bool(weight[3].isnan())
    assert state.indices().tolist() == [2]
