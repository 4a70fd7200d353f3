"""Pairs BASE:TUNED are split at the colon that the user meant, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssrctl.checkpoints.pair_words import split_pair, split_pairs
from ssrctl.errors import UserError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned", "C:/base", "C:/tuned", "run:1", "a", "a:b", "b:c", "c"):
        (tmp_path / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("word", "base", "tuned"),
    [
        ("base:tuned", "base", "tuned"),
        ("tiny-reasoner:tuned", "tiny-reasoner", "tuned"),
        ("nothing:no/where", "nothing", "no/where"),  # said by whatever opens them
        ("C:/base:C:/tuned", "C:/base", "C:/tuned"),
        ("base:run:1", "base", "run:1"),
        ("run:1:base", "run:1", "base"),
        ("org/model:run:1", "org/model", "run:1"),
        ("run:1:org/model", "run:1", "org/model"),
        ("org/model@v1:org/model@refs/pr/1", "org/model@v1", "org/model@refs/pr/1"),
        ("run:1:org/model@v1", "run:1", "org/model@v1"),
    ],
)
def test_the_colon_with_something_on_both_sides(word: str, base: str, tuned: str) -> None:
    assert split_pair(word) == (Path(base), Path(tuned))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base"], "no colon"),
        (["base:"], "no TUNED"),
        ([":tuned"], "no BASE"),
        ([" :tuned"], "no BASE"),
        (["::"], "no BASE"),
        (["org/model:v1:tuned"], "none has a path"),  # a revision
        (["D:/base:D:/tuned"], "none has a path"),
        (["a:b:c"], "can be read as"),
        (["base:tuned", "base:./tuned"], "twice"),
    ],
)
def test_what_is_not_a_pair(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        split_pairs(words)
    assert said in error.value.message and "\n" not in error.value.message
