"""Parts of an update are the largest changes of all tensors, or random ones, as many as asked for."""

from __future__ import annotations

import pytest
import torch

from ssrctl.measures.maths.pruned_update import PrunedUpdate

SHARES = (0.001, 0.1, 0.25, 0.5, 1.0)


def parts(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], order: str, share: float) -> dict:
    update = PrunedUpdate(list(base), base.__getitem__, tuned.__getitem__, 0)
    threshold = update.thresholds(order, SHARES)[share]  # type: ignore[arg-type]
    return {name: update.kept(name, order, threshold) for name in update.names}  # type: ignore[arg-type]


@pytest.mark.parametrize("share", SHARES)
def test_the_largest_changes_of_all_tensors(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(20, 30, generator=generator) for name in "abc"}
    sizes = (
        torch.randperm(400, generator=generator).add(1) / 50
    )  # apart by more than what counts as equal, or nearly so
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["a"].view(-1)[:200] -= sizes[:200]
    tuned["c"].view(-1)[100:300] += sizes[200:]
    found = parts(base, tuned, "largest", share)
    wanted = max(1, round(share * 400))
    assert sum(count for _, count in found.values()) == wanted and set(found) == {"a", "c"}
    kept, left = [], []
    for name, (values, _) in found.items():
        sizes_here, chosen = (tuned[name] - base[name]).abs(), values == tuned[name]
        assert torch.equal(values, torch.where(chosen, tuned[name], base[name]))
        kept.append(sizes_here[chosen & (sizes_here > 0)])
        left.append(sizes_here[~chosen])
    assert torch.cat(kept).numel() == wanted
    if share < 1:
        assert torch.cat(kept).min() > torch.cat(left).max() * (1 - 2**-8)


def test_equal_changes_are_taken_from_every_tensor() -> None:
    base = {name: torch.zeros(1000).bfloat16() for name in "abcd"}
    tuned = {name: torch.full((1000,), 0.5).bfloat16() for name in "abcd"}
    for order in ("largest", "random"):
        counts = [count for _, count in parts(base, tuned, order, 0.25).values()]
        assert sum(counts) == pytest.approx(1000, abs=2)
        assert min(counts) > 180  # 250 each on average, with a standard deviation of 12


def test_an_update_of_nothing() -> None:
    update = PrunedUpdate(["a"], lambda _: torch.tensor([0.0, 1.0]), lambda _: torch.tensor([-0.0, 1.0]), 0)
    assert (update.names, update.num_changed) == ([], 0)
    with pytest.raises(ValueError, match="without changes"):
        update.thresholds("largest", SHARES)
