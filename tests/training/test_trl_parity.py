"""The losses that TRL defines, against TRL's own, over a batch of two questions whose responses have several steps."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from ssrctl.core.losses import response_weights, step_policy_loss

QUESTIONS, GROUP, WIDTH, LONGEST = 2, 4, 9, 11
LOW, HIGH = 0.2, 0.35


def batch(seed: int) -> SimpleNamespace:
    """Ragged responses in steps, advantages per response, ratios on both sides of the clip; one response is masked."""
    random = torch.Generator().manual_seed(seed)
    rows = QUESTIONS * GROUP
    lengths = torch.randint(3, WIDTH + 1, (rows,), generator=random)
    steps = torch.full((rows, WIDTH), -1)
    for row, length in enumerate(lengths):
        steps[row, :length] = torch.arange(int(length)) // 3
    old = -3 * torch.rand(rows, WIDTH, generator=random, dtype=torch.float64)
    return SimpleNamespace(
        steps=steps,
        old=old,
        new=old + 0.4 * torch.randn(rows, WIDTH, generator=random, dtype=torch.float64),
        reference=old + 0.4 * torch.randn(rows, WIDTH, generator=random, dtype=torch.float64),
        advantages=torch.randn(rows, generator=random, dtype=torch.float64),
        masked=torch.arange(rows) == 2,
    )


def theirs(made: SimpleNamespace, loss_type: str, level: str, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("trl", reason="TRL is not installed; pip install trl to compare with its losses")
    from trl import GRPOTrainer

    new = made.new.clone().requires_grad_(True)
    mask = (made.steps >= 0).long() * (~made.masked).long().unsqueeze(1)
    trainer = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=LOW, epsilon_high=HIGH,
        max_completion_length=LONGEST, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": made.advantages, "old_per_token_logps": made.old, "ref_per_token_logps": made.reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), new.grad


def ours(made: SimpleNamespace, loss_type: str, level: str, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over questions and steps, each with a backward pass of its own."""
    new = made.new.clone().requires_grad_(True)
    lengths = (made.steps >= 0).sum(1) * ~made.masked
    total = torch.zeros((), dtype=torch.float64)
    for question in range(QUESTIONS):
        rows = slice(question * GROUP, (question + 1) * GROUP)
        weights = response_weights(
            loss_type, lengths[rows], longest=LONGEST, batch_tokens=float(lengths.sum()) / QUESTIONS
        )
        for step in range(int(made.steps.max()) + 1):
            loss = step_policy_loss(
                new[rows], made.old[rows], made.steps[rows], step,
                made.advantages[rows].masked_fill(made.masked[rows], torch.nan),
                clip_epsilon=LOW, epsilon_high=HIGH, level=level, token_weights=weights, beta=beta,
                reference=made.reference[rows],
            ).loss  # fmt: skip
            if loss is not None:
                (loss / QUESTIONS).backward()
                total += loss.detach() / QUESTIONS
    return total, new.grad


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "level"), [("grpo", "token"), ("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "token")]
)
def test_loss_and_gradient_are_trls(loss_type: str, level: str, beta: float) -> None:
    made = batch(3)
    loss, gradient = theirs(made, loss_type, level, beta)
    found, found_gradient = ours(made, loss_type, level, beta)
    assert float(gradient.abs().max()) > 1e-3
    # float64; sums of some fifty numbers of order 1
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_gradient, gradient, rtol=0, atol=1e-12)
