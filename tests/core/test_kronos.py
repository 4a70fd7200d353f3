"""KronosOpt, compared with a dense float32 implementation of SSR algorithm 2."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.kronos import DenseKronos
from two_tensors import fill, make

from ssrctl.core.bits import bits_to_indices
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient

SHAPES = {"w": (5, 18), "b": (7,), "s": (), "h": (2, 3, 4)}


def parameters(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def dense_mask(seed, density):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def give_gradients(named, rng, coarse, leave_out=None):
    """Random gradients; coarse ones are full of ties and zeros. Returns them as numpy arrays."""
    given_ones = {}
    for name, parameter in named.items():
        if name == leave_out:
            continue
        values = rng.standard_normal(SHAPES[name]).astype(np.float32)
        values = np.asarray(np.round(values) if coarse else values, dtype=np.float32)
        parameter.grad = torch.tensor(values)
        given_ones[name] = values
    return given_ones


@settings(max_examples=9)
@given(
    seed=st.integers(0, 2**31),
    coarse=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.6]),
    clip=st.sampled_from([0.0, 0.3, 1e6]),
)
def test_equals_the_dense_reference_to_the_last_bit(seed, coarse, density, clip):
    named, mask = parameters(seed), dense_mask(seed + 1, density)
    rates = {"w": 0.05, "b": 0.05, "s": 0.7, "h": 0.7}
    groups = [
        {"params": [(n, named[n]) for n in ("w", "b")], "lr": 0.05},
        {"params": [(n, named[n]) for n in ("s", "h")], "lr": 0.7},
    ]
    optimizer = KronosOpt(groups, lr=1.0, protected=BlockMask.from_dense(mask), max_grad_norm=clip)
    reference = DenseKronos(
        {n: p.detach().numpy() for n, p in named.items()}, rates, {n: m.numpy() for n, m in mask.items()}, clip
    )
    start = {n: p.detach().clone() for n, p in named.items()}
    ever = {n: np.zeros(shape, dtype=bool) for n, shape in SHAPES.items()}
    rng = np.random.default_rng(seed)
    for _ in range(3):
        for _ in range(2):
            optimizer.begin_question()
            units, selected = [], []
            for number in range(4):
                k = int(rng.integers(0, 25))
                leave_out = "b" if number == 2 else None
                units.append((give_gradients(named, rng, coarse, leave_out), k))
                selected.append(optimizer.claim(k))
                assert all(parameter.grad is None for parameter in named.values())
            expected = reference.question(units)
            for found, chosen in zip(selected, expected, strict=True):
                for name in SHAPES:
                    ours = found[name].tolist() if name in found else []
                    assert ours == np.flatnonzero(chosen[name]).tolist()
                    ever[name] |= chosen[name]
            _check_disjoint(selected, mask)
        stats = optimizer.step()
        norm, scale, count = reference.step()
        assert stats.grad_norm == pytest.approx(norm, rel=1e-12)  # float64, another order of additions
        assert stats.clip_scale == pytest.approx(scale, rel=1e-12)
        assert stats.num_updated == count
        for name, parameter in named.items():
            assert parameter.detach().numpy().tobytes() == reference.theta[name].tobytes(), name
    for name, parameter in named.items():
        frozen = mask[name]
        assert torch.equal(parameter.detach()[frozen].view(torch.int32), start[name][frozen].view(torch.int32))
        assert (
            bits_to_indices(optimizer.touched[name], parameter.numel()).tolist() == np.flatnonzero(ever[name]).tolist()
        )


def _check_disjoint(selected, mask):
    """The sets of one question share nothing with each other or with what is protected."""
    for name in SHAPES:
        everything = [i for found in selected if name in found for i in found[name].tolist()]
        assert len(everything) == len(set(everything))
        assert not set(everything) & set(np.flatnonzero(mask[name].numpy()).tolist())


def test_claims_run_out():
    named, optimizer = make()
    optimizer.begin_question()
    fill(named, [1.0] * 8, [1.0] * 4)
    assert sum(i.numel() for i in optimizer.claim(10).values()) == 10
    fill(named, [1.0] * 8, [1.0] * 4)
    rest = optimizer.claim(10)
    assert rest["w"].tolist() == []
    assert rest["v"].tolist() == [2, 3]
    fill(named, [1.0] * 8, [1.0] * 4)
    assert sum(i.numel() for i in optimizer.claim(10).values()) == 0


def test_a_new_question_may_claim_the_same_again_and_both_add_up():
    named, optimizer = make(lr=0.5, max_grad_norm=0.0)
    for value in (1.0, 2.0):
        optimizer.begin_question()
        fill(named, [0.0, value, *[0.0] * 6])
        assert optimizer.claim(1)["w"].tolist() == [1]
    stats = optimizer.step()
    assert named["w"].detach().tolist() == [0.0, -1.5, *[0.0] * 6]
    assert stats.num_updated == 1
    assert stats.grad_norm == 3.0


def test_the_clip_is_on_the_sum_over_the_batch():
    named, optimizer = make(lr=1.0, max_grad_norm=1.0)
    for values in ([3.0, *[0.0] * 7], [0.0, 4.0, *[0.0] * 6]):
        optimizer.begin_question()
        fill(named, values)
        optimizer.claim(1)
    stats = optimizer.step()
    assert (stats.grad_norm, stats.clip_scale) == (5.0, 0.2)
    torch.testing.assert_close(named["w"].detach()[:2], torch.tensor([-0.6, -0.8]))


def test_a_small_gradient_is_not_scaled_up():
    named, optimizer = make(lr=1.0, max_grad_norm=1.0)
    optimizer.begin_question()
    fill(named, [0.25, *[0.0] * 7])
    optimizer.claim(1)
    assert optimizer.step().clip_scale == 1.0
    assert float(named["w"].detach()[0]) == -0.25


def test_an_abandoned_question_leaves_the_others():
    named, optimizer = make(lr=1.0, max_grad_norm=0.0)
    optimizer.begin_question()
    fill(named, [1.0, *[0.0] * 7])
    optimizer.claim(1)
    optimizer.begin_question()
    fill(named, [0.0, 5.0, *[0.0] * 6])
    optimizer.claim(1)
    fill(named, [0.0, 0.0, float("nan"), *[0.0] * 5])
    with pytest.raises(NonFiniteGradient):
        optimizer.claim(1)
    optimizer.abandon_question()
    assert all(parameter.grad is None for parameter in named.values())
    with pytest.raises(RuntimeError, match=r"before begin_question"):
        optimizer.claim(1)
    optimizer.step()
    assert named["w"].detach().tolist() == [-1.0, *[0.0] * 7]


def test_a_refused_claim_claims_nothing():
    named, optimizer = make(lr=1.0)
    optimizer.begin_question()
    fill(named, [float("inf"), *[1.0] * 7])
    with pytest.raises(NonFiniteGradient):
        optimizer.claim(3)
    fill(named, [1.0] * 8)
    assert optimizer.claim(1)["w"].tolist() == [0]


def test_a_step_without_claims_changes_nothing():
    named, optimizer = make()
    optimizer.begin_question()
    fill(named, [1.0] * 8)
    optimizer.claim(0)
    stats = optimizer.step()
    assert (stats.grad_norm, stats.clip_scale, stats.num_updated) == (0.0, 1.0, 0)
    assert optimizer.step().num_updated == 0
    assert not named["w"].detach().any()
    assert not optimizer.touched["w"].any()


def test_nothing_is_applied_twice():
    named, optimizer = make(lr=1.0)
    optimizer.begin_question()
    fill(named, [1.0, *[0.0] * 7])
    optimizer.claim(1)
    optimizer.step()
    optimizer.step()
    assert float(named["w"].detach()[0]) == -1.0


def test_budgets_are_fractions_of_what_is_not_protected():
    mask = BlockMask.from_indices({"w": (8,), "v": (4,)}, {"w": torch.tensor([1, 2, 3])})
    _, optimizer = make(protected=mask)
    assert (optimizer.num_coordinates, optimizer.num_protected, optimizer.num_unprotected) == (12, 3, 9)


def test_schedules_move_the_rate():
    named, optimizer = make(lr=1.0, max_grad_norm=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    for expected in (-1.0, -1.5):
        optimizer.begin_question()
        fill(named, [1.0, *[0.0] * 7])
        optimizer.claim(1)
        optimizer.step()
        schedule.step()
        assert float(named["w"].detach()[0]) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_in_float32(dtype):
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = KronosOpt([("w", parameter)], lr=1.0, max_grad_norm=0.0)
    for value in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256 again
        optimizer.begin_question()
        parameter.grad = torch.tensor([0.0, value, 0.0, 0.0], dtype=dtype)
        optimizer.claim(1)
    optimizer.step()
    assert float(parameter.detach()[1]) == -258.0


@pytest.mark.parametrize("allocation", ["disjoint", "overlap", "pooled", "shuffled"])
def test_more_than_there_is_takes_what_there_is_and_says_so(allocation):
    mask = BlockMask.from_indices({"w": (8,), "v": (4,)}, {"w": torch.tensor([0, 7])})
    named, optimizer = make(lr=1.0, max_grad_norm=0.0, protected=mask, allocation=allocation)
    optimizer.begin_question()
    fill(named, [2.0] * 8, [1.0] * 4)
    optimizer.claim(15)
    stats = optimizer.step()
    assert (stats.num_updated, stats.num_missing) == (10, 5)
    assert named["w"].tolist() == [0.0, *[-2.0] * 6, 0.0]
    assert named["v"].tolist() == [-1.0] * 4
    assert optimizer.step().num_missing == 0  # tallies are of one step


def test_tallies_of_reuse():
    named, optimizer = make(lr=1.0, max_grad_norm=0.0, reuse_factor=2.0)
    optimizer.begin_question()
    for _ in range(3):
        fill(named, [5.0, 4.0, *[1.0] * 6], [1.0] * 4)
        assert optimizer.claim(2)["w"].tolist() == [0, 1]
    stats = optimizer.step()
    assert (stats.num_reused, stats.num_updated) == (4, 2)
    assert named["w"].tolist() == [-15.0, -12.0, *[0.0] * 6]
    assert optimizer.step().num_reused == 0


def test_selection_by_blocks_reports_its_recall():
    named = {"w": torch.nn.Parameter(torch.zeros(64, 64))}
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = set(gradient.flatten().abs().topk(40).indices.tolist())
    optimizer = KronosOpt(named.items(), lr=1.0, selection="block", max_grad_norm=0.0)
    optimizer.begin_question()
    named["w"].grad = gradient.clone()
    chosen = optimizer.claim(40)["w"].tolist()
    assert len(chosen) == 40
    assert optimizer.step().selection_recall == pytest.approx(len(exact & set(chosen)) / 40)
    assert optimizer.step().selection_recall is None


def test_what_a_question_keeps():
    named, optimizer = make(lr=1.0, max_grad_norm=0.0)
    assert optimizer.end_question() == []
    optimizer.begin_question()
    for k in (2, 1):
        fill(named, [3.0, 0.0, -4.0, *[0.0] * 5], [1.0] * 4)
        optimizer.claim(k)
    units = optimizer.end_question()
    assert [unit.count for unit in units] == [2, 1]
    assert (units[0].sets["w"].to_indices().tolist(), units[0].values["w"].tolist()) == ([0, 2], [3.0, -4.0])
    assert (units[1].sets["v"].to_indices().tolist(), units[1].values["v"].tolist()) == ([0], [1.0])
    assert optimizer.end_question() == []
    assert optimizer.step().num_updated == 3
