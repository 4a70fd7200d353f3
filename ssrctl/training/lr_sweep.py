"""A short sweep over learning rates: the same few training steps from the same weights at each rate."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import Critic
from ssrctl.critics.rewards import Rewards
from ssrctl.distributed.world import ALONE, World
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.engines.transformers_engine import NonFiniteLogits
from ssrctl.sampling.groups import Prompted
from ssrctl.training.training_step import NonFiniteBatch, TrainingStep
from ssrctl.training.unit_gradients import trainable
from ssrctl.training.updaters import make_updater

SPREAD = (1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0)  # factors of the configured learning rate


@dataclass(frozen=True)
class RateResult:
    """A few training steps at one learning rate.

    Attributes:
        learning_rate: constant over the steps.
        reward: mean reward per step; shorter than ``num_steps`` when the weights became NaN.
        accuracy: share of right responses per step.
        grad_norm: per step, before the clip.
        broke: whether losses or gradients became NaN or infinite.
    """

    learning_rate: float
    reward: list[float]
    accuracy: list[float]
    grad_norm: list[float]
    broke: bool

    @property
    def late_reward(self) -> float | None:
        """Mean reward over the second half of the steps; None when it broke or nothing was scored."""
        return statistics.fmean(self.reward[len(self.reward) // 2 :]) if self.reward and not self.broke else None

    @property
    def late_accuracy(self) -> float | None:
        """Mean accuracy over the second half of the steps; None when it broke."""
        return statistics.fmean(self.accuracy[len(self.accuracy) // 2 :]) if self.accuracy and not self.broke else None


def find_lr(tried: Iterator[RateResult]) -> dict[str, Any]:
    """Print the curve of a ``sweep``, and return it with the rate of the highest late reward.

    Raises:
        UserError: no rate gave a reward.
    """
    results = []
    with console.progress(unit="rates") as bar:
        task = bar.add_task("find-lr", total=len(SPREAD), status="")
        for result in tried:
            results.append(result)
            bar.update(task, advance=1, status=f"{result.learning_rate:.1e}")
    known = [(result.late_reward, result) for result in results if result.late_reward is not None]
    if not known:
        raise UserError("no learning rate gave a reward", "check the critic's scores with --max-steps 1")
    console.show_rates(results)
    best = max(known, key=lambda pair: pair[0])[1]
    console.note(
        f"highest late reward at {best.learning_rate:.1e}; few steps are noisy: take it as the middle of a longer "
        "comparison, and stay below the first rate that breaks"
    )
    rows = [dataclasses.asdict(result) | {"late_reward": result.late_reward} for result in results]
    return {"rates": rows, "best": best.learning_rate}


def sweep(
    loaded: LoadedModel,
    critic: Critic | None,
    config: TrainConfig,
    questions: Callable[[int], Sequence[Prompted]],
    curve: Sequence[float],
    protected: BlockMask | None,
    mask: BlockMask | None,
    *,
    rewards: Rewards | None = None,
    world: World = ALONE,
) -> Iterator[RateResult]:
    """Train ``config.find_lr_steps`` steps at each rate, lowest first; the weights are restored after each, bit for bit.

    Args:
        loaded: the model.
        critic: scores the responses; None in a process that scores none.
        config: the run's settings; its learning rate is the middle of the sweep.
        questions: the questions of step 1, 2, ...; the same for every rate, as are the seeds.
        curve: the budget profile.
        protected, mask: see ``make_updater``.
        rewards: see ``TrainingStep``.
        world: the processes that share each batch; all get the same results.
    """
    parameters = trainable(loaded.model)
    original = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters}
    for factor in SPREAD:
        rate = config.resolved_learning_rate * factor
        updater = make_updater(parameters, dataclasses.replace(config, learning_rate=rate), protected, mask, world)
        step = TrainingStep(loaded, critic, updater, config, curve, world=world, rewards=rewards)
        try:
            yield _at_rate(rate, step, config, questions)
        finally:
            with torch.no_grad():
                for name, parameter in parameters:
                    parameter.copy_(original[name])


def _at_rate(
    rate: float, step: TrainingStep, config: TrainConfig, questions: Callable[[int], Sequence[Prompted]]
) -> RateResult:
    made = RateResult(rate, [], [], [], False)
    for number in range(1, config.find_lr_steps + 1):
        try:
            row = step.run(questions(number), seed=derive_seed(config.seed, "rollout", number), log_masks=False).metrics
        except (NonFiniteBatch, NonFiniteLogits):
            return dataclasses.replace(made, broke=True)
        if row["reward"] is not None:
            made.reward.append(row["reward"])
        made.accuracy.append(row["accuracy"])
        made.grad_norm.append(row["grad_norm"])
    return made
