"""Bad input to KronosOpt: each a clear error or a defined result."""

import pytest
import torch
from two_tensors import fill, make

from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient


def test_refusals():
    named, optimizer = make()
    with pytest.raises(RuntimeError, match="before begin_question"):
        optimizer.claim(1)
    optimizer.begin_question()
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.claim(1)
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0)
    with pytest.raises(ValueError, match="learning rate must be at least 0"):
        KronosOpt(named.items(), lr=-1.0)
    with pytest.raises(ValueError, match="pairs"):
        KronosOpt(list(named.values()), lr=1.0)
    with pytest.raises(ValueError, match="other tensors; first difference: v"):
        KronosOpt(named.items(), lr=1.0, protected=BlockMask.empty({"w": (8,)}))
    with pytest.raises(ValueError, match="other tensors; first difference: w"):
        KronosOpt(named.items(), lr=1.0, protected=BlockMask.empty({"w": (4, 2), "v": (4,)}))
    with pytest.raises(RuntimeError, match="in the middle of a question"):
        optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(1)))]})
    with pytest.raises(ValueError, match="same name"):
        KronosOpt([{"params": [("w", named["w"])]}, {"params": [("w", named["v"])]}], lr=1.0)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_negative_k(scope):
    named, optimizer = make(scope=scope)
    optimizer.begin_question()
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        optimizer.begin_unit(-1)
    optimizer.begin_unit(0)
    named["w"].sum().backward()
    assert all(indices.numel() == 0 for indices in optimizer.claim().values())
    assert optimizer.step().num_updated == 0


@pytest.mark.parametrize("allocation", ["disjoint", "overlap", "pooled", "shuffled"])
def test_gradients_that_nobody_claimed(allocation):
    named, optimizer = make(allocation=allocation)
    optimizer.begin_question()
    fill(named, [1.0] * 8)
    for call in (optimizer.step, optimizer.begin_question, optimizer.end_question):
        with pytest.raises(RuntimeError, match=r"claim\(\) after each backward\(\)"):
            call()
    optimizer.claim(1)
    assert optimizer.step().num_updated == 1
    fill(named, [1.0] * 8)
    with pytest.raises(RuntimeError, match=r"begin_question\(\) with 1 gradients left, first w"):
        optimizer.begin_question()


@pytest.mark.parametrize("k", [None, 2])
def test_units_are_claimed_in_order(k):
    named, optimizer = make(budget=1.0)
    with pytest.raises(RuntimeError, match=r"begin_unit\(\) before begin_question\(\)"):
        optimizer.begin_unit(1)
    optimizer.begin_question([1.0])
    optimizer.begin_unit(k)
    with pytest.raises(RuntimeError, match=r"begin_unit\(\) twice"):
        optimizer.begin_unit(k)
    with pytest.raises(RuntimeError, match="the question ends with an unclaimed gradient"):
        optimizer.step()
    fill(named, [1.0] * 8)
    with pytest.raises(RuntimeError, match=r"k was given to begin_unit\(\) already"):
        optimizer.claim(1)
    optimizer.claim()


def test_pooled_refuses_a_nan_at_the_end_of_the_question_and_can_go_on():
    named, optimizer = make(lr=1.0, allocation="pooled")
    optimizer.begin_question()
    fill(named, [float("nan"), *[1.0] * 7])
    optimizer.claim(1)
    with pytest.raises(NonFiniteGradient):
        optimizer.step()
    optimizer.abandon_question()
    assert named["w"].grad is None
    optimizer.begin_question()
    fill(named, [1.0, *[0.0] * 7])
    optimizer.claim(1)
    assert optimizer.step().num_updated == 1
    assert named["w"].tolist() == [-1.0, *[0.0] * 7]


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("update_rule", "sgdd", "unknown update_rule 'sgdd'; known: sgd, adam, rms"),
        ("scope", "layer", "unknown scope 'layer'; known: global, tensor"),
        ("allocation", "none", "unknown allocation 'none'; known: disjoint, overlap, pooled, shuffled"),
        ("selection", "fast", "unknown selection 'fast'; known: exact, block"),
        ("lr", float("nan"), "the learning rate must be at least 0, got nan"),
        ("lr", float("inf"), "the learning rate must be at least 0, got inf"),
        ("max_grad_norm", -1.0, r"max_grad_norm must be at least 0, got -1\.0"),
        ("budget", 0.0, r"budget must be in \(0, 1\], got 0\.0"),
        ("budget", 1.5, r"budget must be in \(0, 1\], got 1\.5"),
        ("max_step_budget", float("nan"), r"max_step_budget must be in \(0, 1\], got nan"),
        ("reuse_factor", 0.5, r"reuse_factor must be None or at least 1, got 0\.5"),
        ("betas", (0.9, 1.0), r"betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ("eps", 0.0, r"eps must be above 0, got 0\.0"),
    ],
)
def test_settings_out_of_range(setting, value, match):
    with pytest.raises(ValueError, match=match):
        make(**{setting: value})


def test_reuse_only_loosens_the_disjoint_allocation():
    with pytest.raises(ValueError, match="it has no meaning for 'overlap'"):
        make(reuse_factor=2.0, allocation="overlap")


def test_parameters_that_are_refused():
    w = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"t of shape \(4, 3\) is not contiguous in memory"):
        KronosOpt([("t", torch.nn.Parameter(w.detach().t()))], lr=1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        KronosOpt([], lr=1.0)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="give tied parameters once"):
        KronosOpt([("a", w), ("b", w)], lr=1.0)


def test_groups_and_tensors_without_coordinates():
    named = {"w": torch.nn.Parameter(torch.zeros(4)), "none": torch.nn.Parameter(torch.zeros(0, 3))}
    groups = [{"params": []}, {"params": list(named.items())}]
    optimizer = KronosOpt(groups, lr=1.0, max_grad_norm=0.0, protected=BlockMask.empty({"w": (4,), "none": (0, 3)}))
    optimizer.begin_question()
    named["w"].grad, named["none"].grad = torch.ones(4), torch.zeros(0, 3)
    assert {name: i.tolist() for name, i in optimizer.claim(9).items()} == {"w": [0, 1, 2, 3], "none": []}
    assert optimizer.step().num_updated == 4
    optimizer.load_state_dict(optimizer.state_dict())
    only_empty = KronosOpt([{"params": []}], lr=1.0)
    assert only_empty.num_unprotected == 0
    assert only_empty.step().num_updated == 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_when_everything_is_protected_nothing_moves(scope):
    shapes = {"w": (8,), "v": (4,)}
    mask = BlockMask.from_indices(shapes, {name: torch.arange(n) for name, (n,) in shapes.items()})
    named, optimizer = make(lr=1.0, protected=mask, scope=scope)
    assert optimizer.num_unprotected == 0
    optimizer.begin_question()
    optimizer.begin_unit(3)
    (named["w"].sum() + named["v"].sum()).backward()
    assert all(indices.numel() == 0 for indices in optimizer.claim().values())
    assert optimizer.step().num_updated == 0
    (named["w"].sum() + named["v"].sum()).backward()
    assert optimizer.step().num_updated == 0
    assert not named["w"].any()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_without_any_gradient_there_is_nothing_to_claim(scope):
    _, optimizer = make(scope=scope)
    optimizer.begin_question(2)
    with pytest.raises(RuntimeError, match="claim\\(\\) found no"):
        optimizer.claim()
    assert optimizer.step().num_updated == 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_parameters_of_several_dtypes(scope):
    named = {
        "w": torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)),
        "v": torch.nn.Parameter(torch.zeros(4)),
        "u": torch.nn.Parameter(torch.zeros(4, dtype=torch.float16)),
    }
    optimizer = KronosOpt(named.items(), lr=1.0, max_grad_norm=0.0, scope=scope)
    optimizer.begin_question()
    optimizer.begin_unit(6)
    slopes = torch.tensor([0.0, 3.0, 2.0, 1.0])
    sum((parameter.float() * slopes).sum() for parameter in named.values()).backward()
    chosen = optimizer.claim()
    assert {name: indices.tolist() for name, indices in chosen.items()} == {name: [1, 2] for name in named}
    assert optimizer.step().num_updated == 6
    for parameter in named.values():
        assert parameter.tolist() == [0.0, -3.0, -2.0, 0.0]


def test_a_sum_that_overflows_is_refused_and_forgotten():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = KronosOpt([("w", parameter)], lr=1.0)
    for _ in range(2):
        optimizer.begin_question()
        parameter.grad = torch.tensor([3e38, 0.0, 1.0, 0.0])
        optimizer.claim(2)
    with pytest.raises(NonFiniteGradient, match="gradient of w has 1 values"):
        optimizer.step()
    assert optimizer.step().num_updated == 0 and not parameter.detach().any()


def test_an_ordinary_loop_claims_nothing_without_a_signal():
    parameter = torch.nn.Parameter(torch.ones(200))
    optimizer = KronosOpt([("w", parameter)], lr=1.0)
    (parameter * 0).sum().backward()
    assert optimizer.step().num_updated == 0 and parameter.grad is None
    assert not optimizer.touched["w"].any()


def test_an_abandoned_question_is_not_in_the_tally():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = KronosOpt([("w", parameter)], lr=1.0)
    optimizer.begin_question()
    parameter.grad = torch.ones(4)
    optimizer.claim(100)
    optimizer.abandon_question()
    assert optimizer.step().num_missing == 0
