"""`ssrctl critic`: segmented responses in, scored responses out."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from ssrctl.configs import CriticConfig
from ssrctl.critics.base import make_critic
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.jsonl import STDIO, write_jsonl
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.text.answers import check_answer


def run(config: CriticConfig) -> dict[str, Any]:
    """Score every step and return the summary."""
    if config.json and config.output == STDIO:
        raise UserError("--json and the records cannot both go to stdout", "give -o FILE")
    assert config.input is not None
    torn: list[str] = []
    rollouts = list(read_rollouts(config.input, needs=("question", "response", "steps"), on_torn=torn.append))
    for message in torn:
        console.warn(message)
    if config.dry_run:
        plan = {
            "critic": config.critic,
            "responses": len(rollouts),
            "steps": sum(len(rollout.steps or ()) for rollout in rollouts),
            "calls": sum(bool(rollout.steps) for rollout in rollouts) if config.critic == "llm" else 0,
            "output": config.output,
        }
        console.show_plan("plan", plan)
        return plan
    critic = make_critic(config)
    with console.progress(unit="responses") as bar:
        task = bar.add_task(config.critic, total=len(rollouts), status="")
        scores = critic.score(rollouts, on_done=lambda count: bar.update(task, advance=count))
    for rollout, mine in zip(rollouts, scores, strict=True):
        rollout.scores = mine
        rollout.advantages = None  # those of other scores would be wrong for these
        assert rollout.response is not None
        rollout.final = check_answer(rollout.response, rollout.answer)
    write_jsonl(config.output, (rollout.to_dict() for rollout in rollouts))
    summary = summarise(rollouts) | {"torn_lines": len(torn)}
    console.show_plan(f"scored {config.input} -> {config.output}", summary)
    return summary


def summarise(rollouts: list[Rollout]) -> dict[str, Any]:
    """Counts, mean reward, what is missing and why, and accuracy where there are reference answers."""
    scores = [score for rollout in rollouts for score in rollout.scores or ()]
    rewards = [score.reward for score in scores if score.reward is not None]
    graded = [r.final.correct for r in rollouts if r.final is not None and r.final.correct is not None]
    return {
        "responses": len(rollouts),
        "steps": len(scores),
        "mean_reward": statistics.fmean(rewards) if rewards else None,
        "missing": len(scores) - len(rewards),
        "missing_by_class": dict(Counter(score.error for score in scores if score.reward is None)),
        "without_steps": sum(not rollout.steps for rollout in rollouts),
        "accuracy": sum(graded) / len(graded) if graded else None,
    }
