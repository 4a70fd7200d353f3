"""`ssrctl segment`: responses in, responses with step spans out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from ssrctl.configs import SegmentConfig
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.jsonl import STDIO, write_jsonl
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.text.segment import segment


def run(config: SegmentConfig) -> dict[str, Any]:
    """Segment every response and return the summary."""
    if config.json and config.output == STDIO:
        raise UserError("--json and the records cannot both go to stdout", "give -o FILE")
    if config.dry_run:
        plan = {"input": config.input, "output": config.output, "max_steps": config.max_steps}
        console.show_plan("plan", plan)
        return plan
    torn: list[str] = []
    counts: list[int] = []
    finals = 0

    def segmented() -> Iterator[dict[str, Any]]:
        nonlocal finals
        for rollout in read_rollouts(config.input, needs=("response",), on_torn=torn.append):
            _segment_one(rollout, config)
            assert rollout.steps is not None
            counts.append(len(rollout.steps))
            finals += any(step.kind == "final" for step in rollout.steps)
            yield rollout.to_dict()

    write_jsonl(config.output, segmented())
    for message in torn:
        console.warn(message)
    summary = {
        "responses": len(counts),
        "steps": sum(counts),
        "steps_per_response": statistics.fmean(counts) if counts else None,
        "most_steps": max(counts, default=0),
        "without_steps": counts.count(0),
        "with_final": finals,
        "torn_lines": len(torn),
    }
    console.show_plan(f"segmented {config.input} -> {config.output}", summary)
    return summary


def _segment_one(rollout: Rollout, config: SegmentConfig) -> None:
    assert rollout.response is not None
    rollout.steps = segment(rollout.response, max_steps=config.max_steps, min_chars=config.min_chars)
    # Scores and advantages of other spans would be wrong for these.
    rollout.scores = rollout.advantages = None
