"""The table of docs/method.md that maps our settings to TRL's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ssrctl.configs import TrainConfig
from ssrctl.configs.names import flag

DOCS = Path(__file__).parents[2] / "docs" / "method.md"


def test_every_name_of_the_table_exists() -> None:
    trl = pytest.importorskip("trl")
    section = DOCS.read_text(encoding="utf-8").partition("## The same settings in TRL")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    theirs = {spec.name for spec in dataclasses.fields(trl.GRPOConfig)} | {"reward_funcs"}
    ours = {flag(TrainConfig, spec.name) for spec in dataclasses.fields(TrainConfig)}
    assert len(rows) > 10
    for row in rows:
        for name in re.findall(r"`([a-z_]\w*)`", row[2]):
            assert name in theirs, name
        for name in re.findall(r"`(--[\w-]+)", row[1] + row[3]):
            assert name in ours or name == "--master-weights", name
