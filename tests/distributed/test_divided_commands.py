"""Commands whose work is divided among processes: the artifacts of one process, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_processes

from ssrctl.cli import main

PROFILE = [
    "profile-budget",
    "--num-problems",
    "3",
    "--num-generations",
    "4",
    "--max-new-tokens",
    "24",
    "--max-steps",
    "2",
]
SUPERWEIGHTS = [
    "superweights",
    "--method",
    "both",
    "--fraction",
    "0.01",
    "--num-subsets",
    "3",
    "--spike-threshold",
    "3",
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("words", "name"), [(PROFILE, "b.json"), (SUPERWEIGHTS, "s.safetensors")], ids=["profile", "superweights"]
)
def test_the_artifacts_are_those_of_one_process(words: list[str], name: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert main([*words, "--json", "-o", str(tmp_path / "1" / name)]) == 0
    ended = run_processes([*words, "--json", "-o", str(tmp_path / "2" / name)], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) == 2
    assert json.loads(ended[0].out) and ended[1].out == ended[1].err == ""
