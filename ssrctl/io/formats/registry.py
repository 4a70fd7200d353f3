"""The formats by name, and reading and writing in any of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.console import note
from ssrctl.io.files import STDIO, text_bytes
from ssrctl.io.formats.base import Format, Row, StepLabels, labels_before
from ssrctl.io.formats.inspect_ai import INSPECT, archive_rows
from ssrctl.io.formats.inspect_ai import SUFFIX as INSPECT_SUFFIX
from ssrctl.io.formats.lighteval import LIGHTEVAL, parquet_rows
from ssrctl.io.formats.lighteval import SUFFIX as LIGHTEVAL_SUFFIX
from ssrctl.io.formats.lm_eval import LM_EVAL
from ssrctl.io.formats.math_shepherd import MATH_SHEPHERD
from ssrctl.io.formats.ours import OURS
from ssrctl.io.formats.prm800k import PRM800K
from ssrctl.io.formats.prmbench import PRMBENCH
from ssrctl.io.formats.processbench import PROCESSBENCH
from ssrctl.io.formats.stepwise import STEPWISE
from ssrctl.io.formats.verl import VERL
from ssrctl.io.jsonl import parse_json, read_jsonl
from ssrctl.io.records import Rollout
from ssrctl.io.tables import is_table, json_rows, read_rows

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (OURS, PROCESSBENCH, PRM800K, PRMBENCH, STEPWISE, MATH_SHEPHERD, LM_EVAL, VERL, LIGHTEVAL, INSPECT)
}
WRITTEN = [name for name, one in FORMATS.items() if one.write is not None]


def read_formatted_rows(
    path: str | Path, name: str = "auto", *, on_torn: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` of a file in any format, as rows of ours.

    Args:
        path: jsonl, a list of rows in json, csv or tsv (gzipped or not), parquet, an ``.eval`` archive of inspect_ai, or
            ``-`` for jsonl on stdin.
        name: a name of ``FORMATS``; ``auto`` tells it for each row, and takes a row that fits none for ours.
        on_torn: as for ``read_jsonl``.

    Raises:
        UserError: an unreadable file or row, a row that does not fit the named format, or one that fits two.
    """
    readers = {one: made.reader() for one, made in FORMATS.items()}
    empty = True
    for where, row in _source(path, on_torn):
        empty = False
        for made in readers[_format_of(row, name, where).name](row, where):
            yield where, made
    if empty:
        raise UserError(f"{path}: no records in it")


def read_formatted(
    path: str | Path,
    name: str = "auto",
    *,
    needs: tuple[str, ...] = (),
    on_torn: Callable[[str], None] | None = None,
) -> Iterator[Rollout]:
    """Yield the rollouts of a file in any format; see ``read_formatted_rows`` and ``Rollout.from_dict`` for errors."""
    for where, row in read_formatted_rows(path, name, on_torn=on_torn):
        yield Rollout.from_dict(row, where=where, needs=needs)


class Writer:
    """Makes rows of a format, and counts the rollouts and fields that it cannot hold.

    Args:
        name: one of ``WRITTEN``.
        right_from: a step whose score, in [-100, 100], is at least this counts as right.

    Attributes:
        num_written, num_left_out: rollouts; those without steps or without a needed label are left out.
        dropped: number of written rollouts by field that reading their rows does not give back.
    """

    def __init__(self, name: str, right_from: float = 0.0) -> None:
        self.format, self.right_from = FORMATS[name], right_from
        self.num_written = self.num_left_out = 0
        self.dropped: Counter[str] = Counter()
        self._read = self.format.reader()

    def rows(self, rollout: Rollout) -> Iterator[Row]:
        """Yield the row of a rollout, or nothing."""
        labels: StepLabels = step_labels(rollout, self.right_from) if self.format.needs_labels else ()
        if self.format.needs_labels:
            # A blank step is no step of other formats.
            places = [index for index in range(len(labels)) if rollout.step_text(index).strip()]
            labels = [labels[index] for index in places]
            first = labels.index(False) if False in labels else len(labels)
            needed = labels[:first] if self.format is FORMATS["processbench"] else labels
            if not labels or None in needed:
                self.num_left_out += 1
                return
            rollout = _with_steps(rollout, places)
        self.num_written += 1
        assert self.format.write is not None, self.format.name
        row = self.format.write(rollout, labels)
        if self.format is not OURS:
            self.dropped.update(self._lost(rollout, row))
        yield row

    def _lost(self, rollout: Rollout, row: Row) -> set[str]:
        """Return the fields of a rollout that its row does not hold; scores count as held where they became labels."""
        where = f"row:{self.num_written}"
        held = {"scores"} if self.format.needs_labels else set[str]()
        if row.keys() & {"final_answer_correct", "filtered_resps", "score"}:
            held.add("final")
        for made in self._read(row, where):
            back = Rollout.from_dict(made, where=where)
            held |= back.to_dict().keys()
            if back.id != rollout.id:
                held.discard("id")
        return rollout.to_dict().keys() - held

    def check(self) -> None:
        """Say which fields were dropped; raise a UserError if there were rollouts and none could be written."""
        if self.num_left_out and not self.num_written:
            raise UserError(
                f"none of {self.num_left_out} responses has a label for every step, which the format {self.format.name} "
                "needs",
                "use a critic that scores every step, or give labelled solutions",
            )
        if self.dropped:
            fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.dropped.items()))
            note(f"the format {self.format.name} has no place for some fields, which were left out: {fields}")

    def summary(self) -> dict[str, Any]:
        """Return the number of rollouts that were left out, for a format that needs labels, and of dropped fields."""
        left_out = {"left_out": self.num_left_out} if self.format.needs_labels else {}
        return left_out | ({} if self.format is OURS else {"dropped": dict(sorted(self.dropped.items()))})


def step_labels(rollout: Rollout, right_from: float) -> StepLabels:
    """Return a label per step: by its score, else by the labels that the record brought.

    A final answer's score is put on the scale of steps, 2 (r - 50).
    """
    steps = rollout.steps or []
    if rollout.scores is not None:
        return [
            None
            if score.score is None
            else (2 * (score.score - 50) if step.kind == "final" else score.score) >= right_from
            for score, step in zip(rollout.scores, steps, strict=True)
        ]
    labels, label = rollout.extra.get("labels"), rollout.extra.get("label")
    if isinstance(labels, list) and len(labels) == len(steps):
        return labels
    if type(label) is int and -1 <= label < len(steps):
        return labels_before(label, len(steps))
    return [None] * len(steps)


def _with_steps(rollout: Rollout, places: list[int]) -> Rollout:
    assert rollout.steps is not None
    return dataclasses.replace(rollout, steps=[rollout.steps[index] for index in places])


def _format_of(row: Row, name: str, where: str) -> Format:
    if name != "auto":
        chosen = FORMATS[name]
        if name != OURS.name and not chosen.fits(row):
            raise UserError(
                f"{where}: not a row of the format {name}, which has the fields {', '.join(chosen.fields)}",
                f"it has {', '.join(map(str, row))[:200] or 'none'}; name the input's format with --format "
                "(--output-format is that of the output)",
            )
        return chosen
    fitting = [one for one in FORMATS.values() if one.fits(row)]
    if len(fitting) > 1:
        names = " and ".join(one.name for one in fitting)
        raise UserError(f"{where}: the row fits the formats {names}", "say which with --format")
    return fitting[0] if fitting else OURS


def _source(path: str | Path, on_torn: Callable[[str], None] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if str(path) == STDIO:
        return read_jsonl(path, on_torn=on_torn)
    suffix = Path(path).suffix
    if suffix in _ARCHIVES:
        return _ARCHIVES[suffix](Path(path))
    if is_table(str(path)):
        return read_rows(str(path))
    match _first_line(path):
        case b"{":
            return iter([_object(Path(path))])
        case line if line.startswith(b"["):
            return json_rows(Path(path))
    return read_jsonl(path, on_torn=on_torn)


_ARCHIVES = {INSPECT_SUFFIX: archive_rows, LIGHTEVAL_SUFFIX: parquet_rows}


def _first_line(path: str | Path) -> bytes:
    """Return the file's first line that is not blank, without white space around it; empty without any."""
    with text_bytes(path, "file of records") as stream:
        return next((line.strip() for line in stream if line.strip()), b"")


def _object(path: Path) -> tuple[str, dict[str, Any]]:
    """Return ``(where, object)`` of a file that holds one json object over several lines."""
    with text_bytes(path, "json file") as stream:
        data = stream.read()
    try:
        value: dict[str, Any] = parse_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid json: {error}", "fix the file, or write one object per line") from error
    return f"{path}", value
