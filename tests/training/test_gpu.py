"""What must also hold on a CUDA device: run with ``python -m pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import select_topk
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.stages import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(300, 701, generator=generator).to(dtype) for name in ("a", "b")}
    taken = {"a": bits_from_indices(torch.arange(0, 300 * 701, 7), 300 * 701)}
    here = select_topk(gradients, 4000, taken)
    there = select_topk({n: g.cuda() for n, g in gradients.items()}, 4000, {n: t.cuda() for n, t in taken.items()})
    assert all(torch.equal(here[name], there[name].cpu()) for name in gradients)


def test_two_runs_on_the_device_select_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train.run(TrainConfig(output_dir=tmp_path / name, device="cuda", max_steps=2, log_masks_every=1))
    ones, twos = (mask_log_paths(tmp_path / name) for name in ("one", "two"))
    assert "bfloat16" in (tmp_path / "one" / "manifest.json").read_text()
    for first, second in zip(ones, twos, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_run_on_the_device_keeps_its_sets_disjoint(tmp_path: Path) -> None:
    train.run(TrainConfig(output_dir=tmp_path / "run", device="cuda", max_steps=2, log_masks_every=1, save_steps=1))
    for path in mask_log_paths(tmp_path / "run"):
        for question in load_mask_log(path).questions:
            union = question.units[0].mask
            for unit in question.units[1:]:
                assert (union & unit.mask).count() == 0
                union = union | unit.mask
