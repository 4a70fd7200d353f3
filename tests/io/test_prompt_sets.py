import json
from pathlib import Path

import pytest

from ssrctl.errors import UserError
from ssrctl.io.package_data import profile_path
from ssrctl.io.prompt_sets import load_prompt_set


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_without_splits_the_last_third_is_held_out(tmp_path: Path) -> None:
    prompts = load_prompt_set(write(tmp_path / "p.jsonl", [{"text": f"text {i}"} for i in range(7)]))
    assert [p.split for p in prompts] == ["gradient"] * 5 + ["heldout"] * 2
    assert [p.text for p in prompts] == [f"text {i}" for i in range(7)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}] * 3, "has 3 prompts, at least 4"),
        ([{"text": "a"}] * 3 + [{"text": " "}], r"p.jsonl:4: field 'text' must be"),
        ([{"text": "a"}] * 3 + [{"txt": "b"}], r"p.jsonl:4: field 'text' must be"),
        ([{"text": "a"}] * 3 + [{"text": "a", "split": "test"}], "'split' must be gradient or heldout"),
        ([{"text": "a"}] * 3 + [{"text": "a", "split": "heldout"}], "3 of 4 prompts have no 'split'"),
        ([{"text": "a", "split": "gradient"}] * 4, "no prompt with split 'heldout'"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompt_set(write(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize("name", ["general", "tiny-reasoner"])
def test_shipped_sets(name: str) -> None:
    prompts = load_prompt_set(profile_path("prompts", name, ".jsonl"))
    assert sum(p.split == "gradient" for p in prompts) == 16
    assert sum(p.split == "heldout" for p in prompts) == 8
    assert len({p.text for p in prompts}) == 24
