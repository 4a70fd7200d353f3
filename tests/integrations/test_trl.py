"""The callback for other trainers, in a plain transformers ``Trainer``, against counts by numpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ssrctl import BlockMask, KronosOpt, UserError
from ssrctl.core.masked_adamw import MaskedAdamW
from ssrctl.integrations.trl import WeightChanges

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(2, 66).view(8, 8)]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """A trainer fixes the device of the whole process, for the tests that come after too."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Reference(TrainerCallback):
    """Per optimizer step, (weights with other bits, weights with a gradient, those of them with the same bits)."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int]] = []

    @staticmethod
    def bits(model: torch.nn.Module) -> np.ndarray:
        return np.concatenate([p.detach().view(torch.int16).numpy().ravel() for p in model.parameters()])

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs) -> None:
        self.before = self.bits(model)
        self.gradient = np.concatenate([p.grad.float().numpy().ravel() for p in model.parameters()])

    def on_optimizer_step(self, args, state, control, *, model, **kwargs) -> None:
        changed, nonzero = self.bits(model) != self.before, self.gradient != 0
        self.steps.append((int(changed.sum()), int(nonzero.sum()), int((nonzero & ~changed).sum())))


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[list[dict], np.ndarray]:
    """Train 4 steps, logged in pairs, with an evaluation at each; return the log and the reference's counts [4, 3]."""
    reference = Reference()
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1, use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS[:1], optimizers=(optimizer, None),
        callbacks=[reference, WeightChanges()],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        trainer.train()
    return trainer.state.log_history, np.array(reference.steps)


def pairs(values: np.ndarray) -> list[float]:
    return values.reshape(2, 2).mean(1).tolist()


OURS = {
    "kronos": lambda named, mask: KronosOpt(named, lr=3e-3, master_weights=False),
    "kronos-masters": lambda named, mask: KronosOpt(named, lr=3e-3),
    "masked": lambda named, mask: MaskedAdamW(named, mask, lr=2e-4, master_weights=False),
}


@pytest.mark.parametrize("kind", [*OURS, "foreign"])
def test_logged_shares_are_those_of_a_count(kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model.bfloat16()
    embedding = model.get_input_embeddings().weight
    half = (torch.arange(len(embedding)) % 2).bfloat16().unsqueeze(1)
    embedding.register_hook(lambda gradient: gradient * half)  # else no gradient is 0
    total = sum(parameter.numel() for parameter in model.parameters())
    chosen = torch.Generator().manual_seed(0)
    mask = BlockMask.from_dense({n: torch.rand(p.shape, generator=chosen) < 0.3 for n, p in model.named_parameters()})
    foreign = kind == "foreign"
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=2e-4) if foreign else OURS[kind](model.named_parameters(), mask)
    )
    log, counts = trained(model, optimizer, tmp_path)
    rows = [row for row in log if "loss" in row]
    num_changed, num_nonzero, num_unchanged = counts.T
    assert (num_changed > 0).all() and (num_changed < total).all()
    assert [row["bit_changed_frac"] for row in rows] == pytest.approx(pairs(num_changed / total), rel=1e-12)
    own = {"updated_frac", "lost_update_frac"}
    if foreign:
        assert (num_unchanged > 0).all()
        shares = [row["nonzero_gradient_unchanged_frac"] for row in rows]
        assert shares == pytest.approx(pairs(num_unchanged / num_nonzero), rel=1e-12)
        assert not any(own & row.keys() for row in log)
    else:
        num_updated = mask.count() if kind == "masked" else int(0.01 * total)
        assert [row["updated_frac"] for row in rows] == pytest.approx([num_updated / total] * 2, rel=1e-12)
        intended = optimizer.survival.num_intended
        if kind != "kronos-masters":  # an intended update changed the weight or was lost
            assert optimizer.survival.num_lost == intended - num_changed[-1] > 0
        if kind == "kronos":
            assert intended == num_updated
            lost = pairs(1 - num_changed / num_updated)
            assert [row["lost_update_frac"] for row in rows] == pytest.approx(lost, rel=1e-9)
        assert not any("nonzero_gradient_unchanged_frac" in row for row in log)
    assert not any("bit_changed_frac" in row for row in log if "loss" not in row)


def test_sharded_weights_are_refused() -> None:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType

    wrapped = object.__new__(AcceleratedOptimizer)
    wrapped.accelerator_state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(UserError, match="sharded over processes"):
        WeightChanges().on_train_begin(None, None, None, optimizer=wrapped)
