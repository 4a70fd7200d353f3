"""AdamW with float32 masters of half-precision weights."""

from __future__ import annotations

import copy

import pytest
import torch

from ssrctl.core import master_adamw
from ssrctl.core.master_adamw import MasterAdamW
from ssrctl.core.masters import join_master

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradients(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def start(dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masters_follow_torch_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_adamw, "CHUNK", 10)
    ours = start(dtype)
    theirs = torch.nn.Parameter(ours.detach().float())
    optimizer = MasterAdamW([ours], 1e-3, **SETTINGS)
    reference = torch.optim.AdamW([theirs], 1e-3, **SETTINGS)
    for gradient in gradients(20, (7, 11), dtype):
        ours.grad, theirs.grad = gradient, gradient.float()
        optimizer.step()
        reference.step()
    state = optimizer.state[ours]
    master = join_master(ours.detach(), state["remainder"]) if "remainder" in state else ours.detach()
    # Rounding of the last bit can differ with the size of a chunk, by vectorised against scalar code.
    torch.testing.assert_close(master, theirs.detach(), rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.detach(), master.to(dtype))


def test_small_updates_add_up_and_the_lost_share_says_what_storage_would_swallow() -> None:
    """At a rate of 1e-6 a bfloat16 weight near 1 never moves by itself: half a unit in its last place is 2e-3."""
    shares = []
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(weight.detach().clone())
    optimizer = MasterAdamW([weight], 1e-6, weight_decay=0.0)
    torchs = torch.optim.AdamW([plain], 1e-6, weight_decay=0.0)
    for _ in range(100):
        for parameter in (weight, plain):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torchs.step()
        shares.append(optimizer.survival.lost_frac)
    assert torch.equal(plain.detach(), torch.ones(64, dtype=torch.bfloat16)), "torch loses every update"
    master = join_master(weight.detach(), optimizer.state[weight]["remainder"])
    torch.testing.assert_close(1 - master, torch.full((64,), 1e-4), rtol=0.02, atol=0)
    assert shares == [1.0] * 100


def test_a_state_that_was_stored_continues_bit_for_bit() -> None:
    parts = gradients(6, (7, 11), torch.bfloat16)
    whole, first = start(torch.bfloat16), start(torch.bfloat16)
    one, two = MasterAdamW([whole], 1e-2), MasterAdamW([first], 1e-2)
    for number, gradient in enumerate(parts):
        if number == 3:
            stored = copy.deepcopy(two.state_dict())
            first = torch.nn.Parameter(first.detach().clone())
            two = MasterAdamW([first], 1e-2)
            two.load_state_dict(stored)
        whole.grad, first.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step()
    assert torch.equal(whole, first)
    assert all(torch.equal(one.state[whole][field], two.state[first][field]) for field in one.state[whole])


def test_a_parameter_without_a_gradient_stays_and_has_no_state() -> None:
    weight = start(torch.bfloat16)
    before = weight.detach().clone()
    optimizer = MasterAdamW([weight], 1e-2)
    optimizer.step()
    assert torch.equal(weight.detach(), before) and not optimizer.state and optimizer.survival.num_updated == 0
