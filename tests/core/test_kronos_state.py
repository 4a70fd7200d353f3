"""What outlives a step: saved and reloaded state, copies, schedules, parameter groups."""

import copy
import io
import pickle

import accelerate
import pytest
import torch

from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask

SHAPES = {"w": (9, 15), "v": (70,), "s": (), "idle": (6,)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = BlockMask.from_indices(SHAPES, {"w": torch.arange(0, 135, 7), "v": torch.arange(5)})


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def copied(named):
    return {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}


def make(named, **options):
    options = {"lr": 3e-3, "protected": MASK, "budget": 0.2, "max_step_budget": 0.08, **options}
    return KronosOpt([(name, parameter) for name, parameter in named.items()], **options)


def give(named, generator):
    """A gradient that is small for some and large for others; "idle" has none."""
    for name, parameter in named.items():
        if name != "idle":
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (noise * torch.rand(parameter.shape, generator=generator) ** 3).to(parameter)


def train(named, optimizer, steps):
    """Two questions of three units per step; gradients depend on the step's number alone."""
    lost = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for _ in range(2):
            optimizer.begin_question(3)
            for _ in range(3):
                optimizer.begin_unit()
                if optimizer.scope == "global":
                    give(named, generator)
                else:
                    probe = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in named.items()}
                    sum((p * probe[name]).sum() for name, p in named.items() if name != "idle").backward()
                optimizer.claim()
        lost.append(optimizer.step().lost_frac)
    return lost


def bits(named):
    return {name: bytes(parameter.detach().view(-1).view(torch.uint8).tolist()) for name, parameter in named.items()}


def same_state(one, other):
    assert one.keys() == other.keys()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, fields in one["state"].items():
        assert fields.keys() == other["state"][number].keys()
        for name, values in fields.items():
            assert values.dtype == other["state"][number][name].dtype
            assert torch.equal(values, other["state"][number][name]), (number, name)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["sgd", "adam", "rms"])
def test_reloading_and_going_on_equals_never_stopping(rule, dtype, masters):
    options = {"update_rule": rule, "master_weights": masters, "lr": 1e-3}
    named = parameters(dtype)
    optimizer = make(named, **options)
    train(named, optimizer, range(3))
    again = copied(named)
    # Another rate and eps: those of the checkpoint win, as in torch.
    resumed = make(again, **{**options, "lr": 7.0}, eps=0.5, betas=(0.1, 0.2))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    same_state(optimizer.state_dict(), resumed.state_dict())
    lost = train(named, optimizer, range(3, 6))
    assert train(again, resumed, range(3, 6)) == lost
    assert bits(again) == bits(named)
    same_state(optimizer.state_dict(), resumed.state_dict())
    # The comparison could fail: without the state, the same weights go elsewhere where there is state to lose.
    if rule == "adam" or (masters and dtype != torch.float32):
        forgetful = parameters(dtype)
        train(forgetful, make(forgetful, **options), range(3))
        train(forgetful, make(forgetful, **options), range(3, 6))
        assert bits(forgetful) != bits(named)


def test_reloading_in_tensor_scope():
    named = parameters(torch.bfloat16)
    optimizer = make(named, scope="tensor", update_rule="adam")
    train(named, optimizer, range(3))
    again = copied(named)
    resumed = make(again, scope="tensor", update_rule="adam")
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(named, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert bits(again) == bits(named)


def test_the_state_has_what_was_touched_and_no_more():
    named = parameters(torch.bfloat16)
    optimizer = make(named, update_rule="adam")
    train(named, optimizer, range(2))
    state = optimizer.state_dict()["state"]
    assert set(state) <= {0, 1, 2}  # nothing of "idle", which is number 3
    for number, name in enumerate(("w", "v")):
        fields = state[number]
        count = sum(byte.bit_count() for byte in fields["bits"].tolist())
        assert 0 < count < named[name].numel()
        assert fields["bits"].dtype == torch.uint8
        assert fields["bits"].numel() == -(-named[name].numel() // 8)
        dtypes = {key: values.dtype for key, values in fields.items() if key != "bits"}
        assert dtypes == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "remainder": torch.int16}
        assert all(fields[key].shape == (count,) for key in dtypes)


def test_a_loaded_state_is_a_copy():
    named = parameters()
    optimizer = make(named, update_rule="adam")
    train(named, optimizer, range(2))
    state = optimizer.state_dict()
    saved = copy.deepcopy(state)
    again = copied(named)
    resumed = make(again, update_rule="adam")
    resumed.load_state_dict(state)
    train(again, resumed, range(2, 4))
    same_state(state, saved)


def trained_state(**options):
    named = parameters(torch.bfloat16)
    optimizer = make(named, **options)
    train(named, optimizer, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize("theirs", ["sgd", "adam", "rms"])
@pytest.mark.parametrize("ours", ["sgd", "adam", "rms"])
def test_the_state_of_another_rule_is_refused(theirs, ours):
    state, optimizer = trained_state(update_rule=theirs), make(parameters(torch.bfloat16), update_rule=ours)
    if theirs == ours:
        optimizer.load_state_dict(state)
        return
    with pytest.raises(ValueError, match=f"the state is of the update rule '{theirs}', this optimizer's is '{ours}'"):
        optimizer.load_state_dict(state)


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    state = trained_state(update_rule="adam")
    named = parameters(torch.bfloat16)
    optimizer = make(named, update_rule="adam", lr=0.25)
    train(named, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())

    def refused(match, change):
        broken = copy.deepcopy(state)
        change(broken)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(broken)
        same_state(optimizer.state_dict(), before)

    refused("first difference: x, here w", lambda s: s["param_groups"][0].update(param_names=["x", "v", "s", "idle"]))
    refused("different number of parameter groups", lambda s: s["param_groups"].append({"params": []}))
    refused("doesn't match the size", lambda s: s["param_groups"][0].update(params=[0, 1, 2]))
    refused("another length|has shape", lambda s: s["state"][0].update(exp_avg=torch.zeros(1)))
    refused(
        "135 coordinates has 17 bytes of bits", lambda s: s["state"][0].update(bits=torch.zeros(3, dtype=torch.uint8))
    )
    refused("the state of w holds", lambda s: s["state"][0].pop("remainder"))
    refused("the state of w holds", lambda s: s["state"][0].update(remainder=s["state"][0]["exp_avg"]))


def test_masters_must_be_kept_or_not_kept_throughout():
    with pytest.raises(ValueError, match="master_weights and the weights' dtype must be those"):
        make(parameters(torch.bfloat16), master_weights=False).load_state_dict(trained_state())
    with pytest.raises(ValueError, match="the state of w holds"):
        make(parameters(torch.float16)).load_state_dict(trained_state())


def test_claims_that_wait_are_no_state():
    named = parameters()
    optimizer = make(named)
    state = optimizer.state_dict()
    optimizer.begin_question(1)
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"claims that wait to be applied: step\(\) first"):
            call()
    give(named, torch.Generator().manual_seed(0))
    optimizer.claim()
    optimizer.end_question()  # kept, and not applied
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"claims that wait to be applied: step\(\) first"):
            call()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])  # noqa: S301
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_copies_go_on_like_the_original(copier, scope):
    named = parameters(torch.bfloat16)
    optimizer = make(named, update_rule="adam", scope=scope)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # wraps optimizer.step
    train(named, optimizer, range(2))
    schedule.step()
    named_copy, optimizer_copy = copier((named, optimizer))
    start = bits(named)
    train(named_copy, optimizer_copy, range(2, 4))
    assert bits(named) == start  # nothing is shared
    train(named, optimizer, range(2, 4))
    assert bits(named_copy) == bits(named)
    same_state(optimizer.state_dict(), optimizer_copy.state_dict())


def test_groups_have_their_own_rates_and_settings():
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    special = {"lr": 0.5, "betas": (0.5, 0.25), "eps": 1.0}
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], **special}]
    optimizer = KronosOpt(groups, lr=0.1, update_rule="adam", max_grad_norm=0.0)
    for _ in range(3):
        optimizer.begin_question()
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        optimizer.claim(6)
        optimizer.step()
    # By hand: g = s = 1, so v stays 1; m = 1 - b1**t; three updates of lr * m / (1 + eps).
    assert a.tolist() == pytest.approx([-0.1 * (0.1 + 0.19 + 0.271)] * 3, rel=1e-5)
    assert b.tolist() == pytest.approx([-0.5 * (0.5 + 0.75 + 0.875) / 2] * 3, rel=1e-6)


def test_rms_reads_eps_from_the_group():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [("a", a)], "eps": 1.0}, {"params": [("b", b)], "eps": 3.0}]
    optimizer = KronosOpt(groups, lr=1.0, update_rule="rms")
    optimizer.begin_question()
    a.grad, b.grad = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])
    optimizer.claim(4)
    optimizer.step()
    assert (a.tolist(), b.tolist()) == ([-0.5, 0.5], [-0.25, -0.25])


def test_a_group_that_is_added_later():
    a, b = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(6))
    mask = BlockMask.from_indices({"a": (4,)}, {"a": torch.tensor([0])})
    optimizer = KronosOpt([("a", a)], lr=1.0, protected=mask, max_grad_norm=0.0)
    optimizer.add_param_group({"params": [("b", b)], "lr": 0.5})
    assert (optimizer.num_coordinates, optimizer.num_unprotected) == (10, 9)
    optimizer.begin_question()
    a.grad, b.grad = torch.full((4,), 2.0), torch.ones(6)
    chosen = optimizer.claim(5)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {"a": [1, 2, 3], "b": [0, 1]}
    optimizer.step()
    assert a.tolist() == [0.0, -2.0, -2.0, -2.0]
    assert b.tolist() == [-0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    for bad, error, match in [
        ({"params": [("a", torch.nn.Parameter(torch.zeros(1)))]}, ValueError, "same name: a"),
        ({"params": [("c", b)]}, ValueError, "more than one parameter group"),
        ({"params": [torch.nn.Parameter(torch.zeros(1))]}, ValueError, "names"),
    ]:
        with pytest.raises(error, match=match):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 2
        assert set(optimizer.named) == {"a", "b"}


def test_schedules_with_cycled_betas_and_rates_apply_to_the_step_they_precede():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = KronosOpt([("w", parameter)], lr=1.0, max_grad_norm=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=6, cycle_momentum=True)
    total = 0.0
    for _ in range(5):
        rate = optimizer.param_groups[0]["lr"]
        optimizer.begin_question()
        parameter.grad = torch.tensor([2.0, 0.0])
        optimizer.claim(1)
        optimizer.step()
        total -= 2.0 * rate
        schedule.step()
        assert float(parameter.detach()[0]) == pytest.approx(total, rel=1e-6)


@pytest.fixture
def accelerator():
    made = accelerate.Accelerator(cpu=True)
    yield made
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_as_the_optimizer_of_accelerate(scope, accelerator):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "budget": 0.5, "max_step_budget": 0.5, "scope": scope, "update_rule": "adam"}
    plain = KronosOpt(twin.named_parameters(), **options)
    prepared, optimizer = accelerator.prepare(model, KronosOpt(model.named_parameters(), **options))
    start = copy.deepcopy(twin.state_dict())
    for step in range(3):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        accelerator.backward(prepared(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        twin(inputs).square().mean().backward()
        plain.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert not torch.equal(parameter, start[name])
    same_state(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_may_move_before_its_first_step(device, dtype):
    named, twin = parameters(dtype), parameters(dtype)
    optimizer, stays = make(named), make(twin)
    for parameter in named.values():
        parameter.data = parameter.data.to(device)
    train(named, optimizer, range(3))
    train(twin, stays, range(3))
    assert bits({name: parameter.cpu() for name, parameter in named.items()}) == bits(twin)
