"""AdamW on a mask, compared with ``torch.optim.AdamW`` on dense and on gathered weights."""

import copy
import io

import pytest
import torch

from ssrctl.core.mask import BlockMask
from ssrctl.core.masked_adamw import MaskedAdamW
from ssrctl.core.masters import join_master, split_master

SHAPES = {"a": (40, 33), "b": (100,), "none": (5, 5), "c": (3, 7, 5)}
SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-6}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_mask(density=0.2, seed=0):
    dense = {
        name: torch.rand(shape, generator=generator(seed + i)) < density
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    dense["none"][:] = False
    return BlockMask.from_dense(dense)


def make_params(dtype=torch.float32):
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator(50 + i)).to(dtype))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def gradient(step, i, shape, dtype=torch.float32):
    return (torch.randn(shape, generator=generator(1000 * step + i)) * 10.0 ** (i - 2)).to(dtype)


def give_gradients(params, step, mask=None):
    for i, (name, parameter) in enumerate(params.items()):
        parameter.grad = gradient(step, i, parameter.shape, parameter.dtype)
        if mask is not None:
            parameter.grad[~mask.tensors[name].to_dense()] = 0


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def test_equals_dense_adamw_with_the_gradient_zeroed_elsewhere():
    mask, ours, theirs = make_mask(), make_params(), make_params()
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    masked = MaskedAdamW(ours.items(), mask, lr=3e-3, weight_decay=0.0, **SETTINGS)
    dense = torch.optim.AdamW(theirs.values(), lr=3e-3, weight_decay=0.0, **SETTINGS)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step, mask)
        masked.step()
        dense.step()
        for name in SHAPES:
            chosen = mask.tensors[name].to_dense()
            same_bits(ours[name][chosen], theirs[name][chosen])
            same_bits(ours[name][~chosen], before[name][~chosen])
    assert all(not torch.equal(ours[name], before[name]) for name in ("a", "b", "c"))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_adamw_of_the_gathered_weights_bit_for_bit(weight_decay):
    mask, params = make_mask(), make_params()
    chosen = {name: mask.tensors[name].to_indices() for name in SHAPES}
    gathered = {name: torch.nn.Parameter(params[name].detach().flatten()[chosen[name]]) for name in SHAPES}
    before = {name: parameter.detach().clone() for name, parameter in params.items()}
    masked = MaskedAdamW(params.items(), mask, lr=3e-3, weight_decay=weight_decay, **SETTINGS)
    dense = torch.optim.AdamW(gathered.values(), lr=3e-3, weight_decay=weight_decay, foreach=False, **SETTINGS)
    for step in range(20):
        give_gradients(params, step)
        for name, parameter in gathered.items():
            parameter.grad = params[name].grad.flatten()[chosen[name]]
        masked.step()
        dense.step()
        for name in SHAPES:
            same_bits(params[name].flatten()[chosen[name]], gathered[name])
            outside = ~mask.tensors[name].to_dense()
            same_bits(params[name][outside], before[name][outside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_exact_masters(dtype):
    """Updates of 1e-5 of weights of about 1 vanish in bf16 and in fp16; the float32 run does not lose them."""
    mask, params = make_mask(), make_params(dtype)
    chosen = {name: mask.tensors[name].to_indices() for name in SHAPES}
    masters = {name: torch.nn.Parameter(p.detach().float().flatten()[chosen[name]]) for name, p in params.items()}
    before = {name: parameter.detach().clone() for name, parameter in params.items()}
    masked = MaskedAdamW(params.items(), mask, lr=1e-5, weight_decay=0.01, **SETTINGS)
    full = torch.optim.AdamW(masters.values(), lr=1e-5, weight_decay=0.01, foreach=False, **SETTINGS)
    for step in range(40):
        give_gradients(params, step)
        for name, parameter in masters.items():
            parameter.grad = params[name].grad.flatten()[chosen[name]].float()
        masked.step()
        full.step()
    for name, parameter in params.items():
        stored = parameter.detach().flatten()[chosen[name]]
        same_bits(stored, split_master(masters[name].detach(), dtype)[0])
        outside = ~mask.tensors[name].to_dense()
        same_bits(parameter[outside], before[name][outside])
        if chosen[name].numel():
            same_bits(join_master(stored, masked.state[parameter]["remainder"]), masters[name])
    assert not torch.equal(params["a"], before["a"])


def test_without_masters_small_updates_are_swallowed():
    params = {"w": torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))}
    mask = BlockMask.from_dense({"w": torch.ones(64, dtype=torch.bool)})
    for masters, moved in ((False, False), (True, True)):
        optimizer = MaskedAdamW(params.items(), mask, lr=1e-4, weight_decay=0.0, master_weights=masters)
        for _ in range(60):
            params["w"].grad = torch.full((64,), -1.0, dtype=torch.bfloat16)
            optimizer.step()
        assert ("remainder" in optimizer.state[params["w"]]) == masters
        assert bool((params["w"] > 1).all()) == moved


def test_state_is_that_of_the_masked_coordinates_alone():
    mask, params = make_mask(), make_params(torch.bfloat16)
    optimizer = MaskedAdamW(params.items(), mask)
    assert optimizer.num_trained == mask.count()
    assert params["none"] not in optimizer.state
    count = mask.tensors["a"].count()
    sizes = {key: tuple(value.shape) for key, value in optimizer.state[params["a"]].items()}
    assert sizes == {
        "step": (),
        "exp_avg": (count,),
        "exp_avg_sq": (count,),
        "low": (count,),
        "counts": (1,),
        "remainder": (count,),
    }
    # moments, low 16 bits and remainder; a block count and a step count per tensor
    assert optimizer.num_bytes == mask.count() * (4 + 4 + 2 + 2) + 3 * (4 + 4)
    storages = [value.untyped_storage().data_ptr() for state in optimizer.state.values() for value in state.values()]
    assert len(set(storages)) == len(storages)


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saved_loaded_and_continued_equals_never_stopping(dtype):
    mask, params = make_mask(), make_params(dtype)
    optimizer = MaskedAdamW(params.items(), mask, lr=1e-3)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    state, weights = saved(optimizer), {name: parameter.detach().clone() for name, parameter in params.items()}
    for step in range(5, 10):
        give_gradients(params, step)
        optimizer.step()
    again = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    resumed = MaskedAdamW(again.items(), mask, lr=99.0)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 1e-3
    for step in range(5, 10):
        give_gradients(again, step)
        resumed.step()
    for name in SHAPES:
        same_bits(again[name], params[name])
        ours, theirs = optimizer.state.get(params[name], {}), resumed.state.get(again[name], {})
        assert ours.keys() == theirs.keys()
        for key in ours:
            same_bits(ours[key], theirs[key])


def test_loaded_and_copied_optimizers_train_on_their_own():
    mask, params = make_mask(), make_params()
    optimizer = MaskedAdamW(params.items(), mask)
    give_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    loaded_params = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in params.items()}
    loaded = MaskedAdamW(loaded_params.items(), mask)
    loaded.load_state_dict(optimizer.state_dict())
    copied_params, copied = copy.deepcopy((params, optimizer))
    for each, named in ((loaded, loaded_params), (copied, copied_params)):
        give_gradients(named, 1)
        each.step()
    for place, kept in optimizer.state_dict()["state"].items():
        for key, value in kept.items():
            same_bits(value, before[place][key])
    give_gradients(params, 1)
    optimizer.step()
    for name in SHAPES:
        same_bits(params[name], loaded_params[name])
        same_bits(params[name], copied_params[name])


def test_state_of_another_mask_or_dtype_is_refused():
    optimizer = MaskedAdamW(make_params().items(), make_mask())
    shifted = {name: tiles.to_dense().roll(1) for name, tiles in make_mask().tensors.items()}
    with pytest.raises(ValueError, match="a: the state to load was made with another mask"):
        optimizer.load_state_dict(MaskedAdamW(make_params().items(), BlockMask.from_dense(shifted)).state_dict())
    with pytest.raises(ValueError, match=r"a: exp_avg is torch\.float32 \[\d+\] in the state to load"):
        optimizer.load_state_dict(MaskedAdamW(make_params().items(), make_mask(0.4)).state_dict())
    with pytest.raises(ValueError, match="a: the state to load and the optimizer differ in remainder"):
        optimizer.load_state_dict(MaskedAdamW(make_params(torch.bfloat16).items(), make_mask()).state_dict())
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(torch.optim.AdamW([torch.zeros(3)]).state_dict())


def test_schedules_groups_and_closures():
    mask, params = make_mask(), make_params()
    groups = [
        {"params": [("a", params["a"]), ("none", params["none"])], "lr": 0.0},
        {"params": [("b", params["b"]), ("c", params["c"])]},
    ]
    optimizer = MaskedAdamW(groups, mask, lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    before = {name: parameter.detach().clone() for name, parameter in params.items()}

    def closure():
        loss = sum((parameter**2).sum() for parameter in params.values())
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    same_bits(params["a"], before["a"])
    moved = before["b"] - params["b"].detach()
    # bias correction makes the first step lr * sign(g)
    expected = 0.1 * before["b"].sign() * mask.tensors["b"].to_dense()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    schedule.step()
    after = params["b"].detach().clone()
    optimizer.step(closure)
    same_bits(params["b"], after)


def test_parameters_without_gradient_are_left_alone():
    mask, params = make_mask(), make_params()
    optimizer = MaskedAdamW(params.items(), mask, weight_decay=0.5)
    before = params["b"].detach().clone()
    give_gradients(params, 0)
    params["b"].grad = None
    optimizer.step()
    same_bits(params["b"], before)
    assert float(optimizer.state[params["b"]]["step"]) == 0
    assert float(optimizer.state[params["a"]]["step"]) == 1


def test_gradients_stay_as_they_were_and_may_be_strided():
    mask, params, others = make_mask(), make_params(), make_params()
    optimizer, other = (MaskedAdamW(p.items(), mask) for p in (params, others))
    give_gradients(params, 0)
    give_gradients(others, 0)
    others["a"].grad = others["a"].grad.t().contiguous().t()
    assert not others["a"].grad.is_contiguous()
    kept = params["a"].grad.clone()
    optimizer.step()
    other.step()
    same_bits(params["a"].grad, kept)
    same_bits(params["a"], others["a"])


def test_sparse_gradients_are_refused():
    params = {"w": torch.nn.Parameter(torch.zeros(4, 3))}
    optimizer = MaskedAdamW(params.items(), BlockMask.from_dense({"w": torch.ones(4, 3, dtype=torch.bool)}))
    params["w"].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="selects 0 of 1550 coordinates in 4 tensors"):
        MaskedAdamW(make_params().items(), BlockMask.empty(SHAPES))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES | {"b": (101,)}, r"first difference: b is \(101,\) in the mask, \(100,\) among the parameters"),
        (SHAPES | {"z": (1,)}, r"z is \(1,\) in the mask, absent among the parameters"),
        ({"a": (40, 33)}, r"b is absent in the mask, \(100,\) among the parameters"),
    ],
)
def test_a_mask_over_other_tensors_is_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(make_params().items(), ~BlockMask.empty(shapes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "learning rate must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "learning rate"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(make_params().items(), make_mask(), **settings)


def test_parameters_must_be_named_once_and_given_at_the_start():
    params, mask = make_params(), make_mask()
    with pytest.raises(ValueError, match="named_parameters"):
        MaskedAdamW(params.values(), mask)
    with pytest.raises(ValueError, match="two parameters have the same name: b"):
        MaskedAdamW([*params.items(), ("b", torch.nn.Parameter(torch.zeros(3)))], mask)
    with pytest.raises(ValueError, match="not a contiguous floating-point tensor"):
        MaskedAdamW([("w", torch.nn.Parameter(torch.zeros(3, 4).t()))], mask)
    optimizer = MaskedAdamW(params.items(), mask)
    with pytest.raises(ValueError, match="all its parameters at the start"):
        optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(3)))]})
    with pytest.raises(ValueError, match="all its parameters at the start"):
        copy.deepcopy(optimizer).add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(3)))]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    mask, here = make_mask(), make_params(dtype)
    there = {name: torch.nn.Parameter(parameter.detach().cuda()) for name, parameter in here.items()}
    optimizers = MaskedAdamW(here.items(), mask), MaskedAdamW(there.items(), mask)
    for step in range(5):
        give_gradients(here, step)
        for name, parameter in there.items():
            parameter.grad = here[name].grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert all(v.device.type == "cuda" for k, v in optimizers[1].state[there["a"]].items() if k != "step")
    optimizers[1].load_state_dict(saved(optimizers[1]))
    for name in SHAPES:  # two devices round fused operations differently; bf16 may then land on its neighbour
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(there[name].cpu(), here[name], **tolerance)
        outside = ~mask.tensors[name].to_dense()
        same_bits(there[name].cpu()[outside], make_params(dtype)[name][outside])
