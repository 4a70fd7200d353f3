"""`ssrctl segment`: responses in, responses with step spans out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.files import check_links
from ssrctl.configs import TINY, SegmentConfig
from ssrctl.errors import UserError, first_line
from ssrctl.io import console
from ssrctl.io.formats.registry import Writer, read_formatted
from ssrctl.io.jsonl import STDIO, write_jsonl
from ssrctl.io.records import Rollout, StepSpan
from ssrctl.text.segment import segment

_HISTOGRAM_ROWS = 16
_HISTOGRAM_WIDTH = 40


def run(config: SegmentConfig) -> dict[str, Any]:
    """Segment every response and return the summary.

    Raises:
        UserError: records and summary would both go to stdout; the input or the tokenizer cannot be read; no response
            has the labels that the output's format needs.
    """
    if config.json and config.output == STDIO:
        raise UserError("--json and the records cannot both go to stdout", "give -o FILE")
    if config.dry_run:
        plan = {"input": config.input, "output": config.output, **config.segment_arguments}
        plan["tokenizer"] = config.tokenizer
        console.show_plan("plan", plan)
        return plan
    counts = _StepCounts(_load_tokenizer(config.tokenizer) if config.tokenizer else None)
    torn: list[str] = []
    writer = Writer(config.output_format)

    def segmented() -> Iterator[dict[str, Any]]:
        for rollout in read_formatted(config.input, config.format, needs=("response",), on_torn=torn.append):
            _segment_one(rollout, config)
            counts.add(rollout)
            yield from writer.rows(rollout)
        writer.check()

    write_jsonl(config.output, segmented())
    for message in torn:
        console.warn(message)
    summary = counts.summary() | {"torn_lines": len(torn)} | writer.summary()
    _show(f"segmented {config.input} -> {config.output}", summary)
    return summary


def _segment_one(rollout: Rollout, config: SegmentConfig) -> None:
    assert rollout.response is not None
    if rollout.steps and {"label", "labels"} & rollout.extra.keys():
        return  # labels count the steps that are there
    rollout.steps = segment(rollout.response, **config.segment_arguments)
    # Earlier scores and advantages belong to other spans.
    rollout.scores = rollout.advantages = None


class _StepCounts:
    """Histograms of steps, characters and tokens, so that memory does not grow with the number of responses."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._steps: Counter[int] = Counter()
        self._chars: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._finals = 0

    def add(self, rollout: Rollout) -> None:
        assert rollout.steps is not None and rollout.response is not None
        self._steps[len(rollout.steps)] += 1
        self._chars.update(step.end - step.start for step in rollout.steps)
        self._finals += any(step.kind == "final" for step in rollout.steps)
        if self._tokenizer is not None:
            self._tokens.update(tokens_per_step(self._tokenizer, rollout.response, rollout.steps))

    def summary(self) -> dict[str, Any]:
        return {
            "responses": self._steps.total(),
            "steps": self._chars.total(),
            "without_steps": self._steps[0],
            "with_final": self._finals,
            "steps_per_response": _spread(self._steps),
            "chars_per_step": _spread(self._chars),
            "tokens_per_step": _spread(self._tokens) if self._tokenizer is not None else None,
            "steps_histogram": {str(steps): count for steps, count in sorted(self._steps.items())},
        }


def _spread(counts: Counter[int]) -> dict[str, float] | None:
    """Return mean, median (the lower one of two) and maximum of a histogram, None for an empty one."""
    total = counts.total()
    if not total:
        return None
    seen, median = 0, 0
    for value, count in sorted(counts.items()):
        seen += count
        if 2 * seen >= total:
            median = value
            break
    mean = sum(value * count for value, count in counts.items()) / total
    return {"mean": mean, "median": median, "max": max(counts)}


# --------------------------------------------------------------------------------------------------
# tokens


def tokens_per_step(tokenizer: Any, response: str, steps: list[StepSpan]) -> list[int]:
    """Count the tokens of each step by the tokenizer's own offsets; a token counts for the step it starts in.

    Args:
        tokenizer: a fast tokenizer.
        response: the whole text, which is encoded in one piece.
        steps: spans that cover it.
    """
    from ssrctl.sampling.alignment import step_of_tokens
    from ssrctl.text.prompts import without_surrogates

    encoded = tokenizer(without_surrogates(response), add_special_tokens=False, return_offsets_mapping=True)
    counts = [0] * len(steps)
    for step in step_of_tokens([start for start, _ in encoded["offset_mapping"]], steps):
        if step >= 0:
            counts[step] += 1
    return counts


def _load_tokenizer(name: str) -> Any:
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoTokenizer

    hub_logging.set_verbosity_error()
    if name == TINY:
        from ssrctl import tiny_reasoner

        source = str(tiny_reasoner.path())
    else:
        source = str(Path(name).expanduser())
        if name.startswith(("/", ".", "~")) and not Path(source).is_dir():
            raise UserError(f"tokenizer folder not found: {name}", "name a folder with tokenizer.json")
    if Path(source).is_dir():
        check_links(Path(source))
    try:
        # False: transformers would otherwise ask whether to run code that the folder brings.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json makes its parsers raise nearly any type
        own_code = "trust_remote_code" in str(error)
        reason = "it brings its own code, which is not run" if own_code else first_line(error)
        raise UserError(
            f"the tokenizer {name} cannot be loaded: {reason}",
            "name a folder with tokenizer.json or a model on the hub",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {name} gives no character offsets ({type(tokenizer).__name__} is not a fast one)",
            "convert it to a tokenizer.json",
        )
    tokenizer.model_max_length = sys.maxsize  # no model runs on the tokens, so no length needs a warning
    return tokenizer


# --------------------------------------------------------------------------------------------------
# terminal output


def _show(title: str, summary: dict[str, Any]) -> None:
    """Print the counts, the spread of lengths and the histogram of steps per response."""
    from rich.table import Table

    spreads = {name: summary[name] for name in ("steps_per_response", "chars_per_step", "tokens_per_step")}
    histogram = {int(steps): count for steps, count in summary["steps_histogram"].items()}
    console.show_plan(title, {name: summary[name] for name in summary if name not in (*spreads, "steps_histogram")})
    table = Table("", "mean", "median", "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, spread in spreads.items():
        if spread is not None:
            table.add_row(name.replace("_", " "), f"{spread['mean']:.1f}", str(spread["median"]), str(spread["max"]))
    screen = console.console()
    if table.row_count:
        screen.print()
        screen.print(table)
    if histogram:
        screen.print()
        screen.print(_bars(histogram))


def _bars(histogram: dict[int, int]) -> Any:
    """Draw one bar per number of steps, or per range of them; its length shows the number of responses."""
    from rich.bar import Bar
    from rich.table import Table

    low, high = min(histogram), max(histogram)
    width = -(-(high - low + 1) // _HISTOGRAM_ROWS)
    rows: Counter[int] = Counter()
    for steps, count in histogram.items():
        rows[(steps - low) // width] += count
    largest = max(rows.values())
    table = Table("steps", "responses", "", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    for row in range(max(rows) + 1):
        first = low + row * width
        last = min(first + width - 1, high)
        # A row that is not empty shows at least an eighth of a block.
        length = max(rows[row], largest / (8 * _HISTOGRAM_WIDTH)) if rows[row] else 0
        bar = Bar(largest, 0, length, width=_HISTOGRAM_WIDTH)
        table.add_row(str(first) if first == last else f"{first}-{last}", str(rows[row]), bar)
    return table
