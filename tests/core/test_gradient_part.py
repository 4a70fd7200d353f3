"""Claims from a gradient that three processes hold in ranges, compared with claims from the whole one."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssrctl.core.gradient_part import GradientPart, range_size
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.layout import WORD, Layout
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient

NUM_PROCESSES = 3
SHAPES = {"a": (70, 5), "frozen": (9,), "b": (3,), "scale": (), "none": (0, 4), "c": (401,)}
KS = (60, 0, 200, 10**6)


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def optimizer(named, **settings):
    protected = BlockMask.from_indices(SHAPES, {"a": torch.arange(0, 350, 4)})
    return KronosOpt(named.items(), 0.1, protected=protected, max_grad_norm=0.0, **settings)


def gradients(unit):
    """Of few magnitudes, so that there are ties; one tensor has none in the first unit, another never."""
    generator = torch.Generator().manual_seed(unit)
    without = {"frozen", "b"} if unit == 0 else {"frozen"}
    made = {name: torch.randint(-4, 5, shape, generator=generator).float() for name, shape in SHAPES.items()}
    return {name: gradient for name, gradient in made.items() if name not in without}


def claimed(allocation, claim):
    named = weights()
    made = optimizer(named, allocation=allocation)
    made.begin_question()
    chosen = []
    for unit, k in enumerate(KS):
        made.begin_unit(k)
        chosen.append({name: indices.tolist() for name, indices in claim(made, named, gradients(unit)).items()})
    stats = made.step()
    return chosen, stats, {name: parameter.detach().clone() for name, parameter in named.items()}


def whole(made, named, gradients):
    for name, gradient in gradients.items():
        named[name].grad = gradient
    return made.claim()


def part(made, named, gradients):
    layout = Layout(gradients, align=WORD)
    size, rank = range_size(layout, NUM_PROCESSES), dist.get_rank()
    flat = torch.zeros(size * NUM_PROCESSES)
    for name, gradient in gradients.items():
        flat[layout.offsets[name] :][: gradient.numel()] = gradient.flatten()
    return made.claim_part(GradientPart(flat[rank * size : (rank + 1) * size], layout, dist.group.WORLD))


def worker(rank, store, expected):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_PROCESSES)
    for allocation, (chosen, stats, after) in expected.items():
        found, same, weights_after = claimed(allocation, part)
        for mine, wanted in zip(found, chosen, strict=True):
            assert {n: i for n, i in mine.items() if i} == {n: i for n, i in wanted.items() if i}, allocation
        assert same == stats
        assert all(weights_after[name].equal(tensor) for name, tensor in after.items())
    made = optimizer(weights())
    made.begin_question()
    made.begin_unit(5)
    broken = copy.deepcopy(gradients(1))
    broken["c"][400] = float("nan")
    with pytest.raises(NonFiniteGradient, match="the gradient of c has 1 values"):
        part(made, {}, broken)
    dist.destroy_process_group()


def test_three_processes_claim_what_one_would():
    expected = {allocation: claimed(allocation, whole) for allocation in ("disjoint", "overlap")}
    assert expected["disjoint"][1].num_missing > 0 and expected["disjoint"][0] != expected["overlap"][0]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), expected)
        torch.multiprocessing.start_processes(worker, arguments, nprocs=NUM_PROCESSES, start_method="fork")


def test_settings_that_need_the_whole_gradient_are_refused():
    for settings in ({"scope": "tensor"}, {"allocation": "shuffled"}, {"selection": "block"}, {"reuse_factor": 2.0}):
        made = optimizer(weights(), **settings)
        made.begin_question()
        with pytest.raises(ValueError, match="need the whole gradient"):
            made.claim_part(None)
