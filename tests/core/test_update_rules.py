"""Update rules: gathered values by hand, and long sparse runs against dense moments in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.kronos import DenseKronos

from ssrctl.core.kronos import KronosOpt
from ssrctl.core.update_rules import RULES, Contribution, Hyper

SHAPES = {"w": (6, 7), "v": (9,), "s": ()}


def contribution(gradient, squares=None, is_new=None):
    gradient = torch.tensor(gradient)
    return Contribution(
        gradient,
        torch.empty(0) if squares is None else torch.tensor(squares),
        torch.zeros(gradient.shape, dtype=torch.bool) if is_new is None else torch.tensor(is_new),
    )


@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_rules_without_moments_give_the_sum_as_it_is(rule):
    direction, moments = RULES[rule].direction(contribution([1.5, -2.0]), {}, Hyper())
    assert direction.tolist() == [1.5, -2.0]
    assert moments == {}
    assert RULES[rule].moments == ()


def test_adam_starts_a_coordinate_with_a_tenth_of_a_step_and_then_decays():
    hyper = Hyper((0.9, 0.75), eps=1e-30)
    old = {"exp_avg": torch.tensor([0.0, 1.0]), "exp_avg_sq": torch.tensor([0.0, 16.0])}
    direction, new = RULES["adam"].direction(contribution([4.0, 4.0], [16.0, 64.0], [True, False]), old, hyper)
    assert new["exp_avg"].tolist() == pytest.approx([0.4, 0.9 + 0.4])
    assert new["exp_avg_sq"].tolist() == pytest.approx([16.0, 0.75 * 16 + 0.25 * 64])
    assert direction.tolist() == pytest.approx([0.1, 1.3 / 28**0.5])


def test_adam_does_not_move_without_gradients():
    old = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    direction, _ = RULES["adam"].direction(contribution([0.0], [0.0], [True]), old, Hyper())
    assert direction.tolist() == [0.0]


def test_the_unit_scale_of_rms():
    assert RULES["rms"].unit_scale(4.0, 1.0) == 0.2
    assert RULES["sgd"].unit_scale is RULES["adam"].unit_scale is None


def gradients(rng, scale):
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["sgd", "adam", "rms"]),
    clip=st.sampled_from([0.0, 0.05, 1e6]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.5), (0.5, 0.999)]),
    eps=st.sampled_from([1e-8, 1e-2]),
)
def test_many_steps_equal_dense_moments(seed, rule, clip, betas, eps):
    rng = np.random.default_rng(seed)
    start = gradients(rng, 1.0)
    named = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = KronosOpt(named.items(), lr=0.02, update_rule=rule, betas=betas, eps=eps, max_grad_norm=clip)
    reference = DenseKronos(
        start,
        dict.fromkeys(SHAPES, 0.02),
        {name: np.zeros(shape, dtype=bool) for name, shape in SHAPES.items()},
        clip,
        rule=rule,
        betas=betas,
        eps=eps,
    )
    for _ in range(15):
        for _ in range(2):
            units = [(gradients(rng, 10.0 ** rng.integers(-4, 3)), int(rng.integers(0, 12))) for _ in range(3)]
            optimizer.begin_question()
            for unit, k in units:
                for name, values in unit.items():
                    named[name].grad = torch.tensor(values)
                optimizer.claim(k)
            reference.question(units)
        stats = optimizer.step()
        norm, scale, _ = reference.step()
        assert stats.grad_norm == pytest.approx(norm, rel=1e-12)
        assert stats.clip_scale == pytest.approx(scale, rel=1e-12)
        for name in SHAPES:
            assert named[name].detach().numpy().tobytes() == reference.theta[name].tobytes(), name


def one_unit(rule, values, *, clip, k=2):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = KronosOpt([("w", parameter)], lr=1.0, update_rule=rule, max_grad_norm=clip, betas=(0.5, 0.5), eps=1e-12)
    optimizer.begin_question()
    parameter.grad = torch.tensor(values)
    optimizer.claim(k)
    return optimizer.step(), parameter.tolist(), optimizer.state_dict()["state"].get(0, {})


def test_the_norm_is_that_of_what_was_kept():
    stats, weights, _ = one_unit("sgd", [3.0, 4.0, 2.0, -2.0], clip=1.0)
    assert (stats.grad_norm, stats.clip_scale) == (5.0, 0.2)
    assert weights == pytest.approx([-0.6, -0.8, 0.0, 0.0])


def test_adam_clips_squares_by_the_square_of_the_scale():
    stats, weights, state = one_unit("adam", [3.0, 4.0, 2.0, -2.0], clip=1.0)
    assert (stats.grad_norm, stats.clip_scale) == (5.0, 0.2)
    assert state["exp_avg"].tolist() == pytest.approx([0.5 * 0.6, 0.5 * 0.8])
    assert state["exp_avg_sq"].tolist() == pytest.approx([0.6**2, 0.8**2])
    assert weights == pytest.approx([-0.5, -0.5, 0.0, 0.0])


def test_adam_adds_up_each_units_own_squares():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = KronosOpt([("w", parameter)], lr=1.0, update_rule="adam", max_grad_norm=0.0)
    for value in (3.0, -3.0):
        optimizer.begin_question()
        parameter.grad = torch.tensor([value, 0.0])
        optimizer.claim(1)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert (state["exp_avg"].tolist(), state["exp_avg_sq"].tolist()) == ([0.0], [18.0])


def test_rms_is_not_clipped_and_has_the_same_step_at_every_scale():
    for scale in (1.0, 1e3):
        stats, weights, _ = one_unit("rms", [3.0 * scale, 4.0 * scale, 0.0, 0.0], clip=1e-3)
        assert stats.clip_scale == 1.0
        assert stats.grad_norm == pytest.approx(2**0.5, rel=1e-6)
        assert weights == pytest.approx([-3 / 12.5**0.5, -4 / 12.5**0.5, 0.0, 0.0], rel=1e-6)


def test_rms_of_a_unit_without_any_gradient_is_no_step():
    _, weights, _ = one_unit("rms", [0.0] * 4, clip=0.0)
    assert weights == [0.0] * 4
