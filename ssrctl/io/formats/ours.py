"""Our own records, and what ``Rollout.from_dict`` understands of similar ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.io.formats.base import Format, Row, StepLabels, each, is_texts
from ssrctl.io.records import Rollout


def _fits(row: Mapping[str, Any]) -> bool:
    return ("response" in row or "completion" in row) and not is_texts(row.get("steps"))


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    return rollout.to_dict()


OURS = Format(
    name="ssrctl",
    fields=("response",),
    fits=_fits,
    reader=each(lambda row, where: row),
    write=_write,
)
