"""Sets of short texts on which a model's language ability is probed: jsonl files in profiles/prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ssrctl.configs import TINY
from ssrctl.errors import UserError
from ssrctl.io.console import note
from ssrctl.io.jsonl import read_jsonl
from ssrctl.io.package_data import profile_path

Split = Literal["gradient", "heldout"]
MIN_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class LanguagePrompt:
    """One text. Example: ``{"text": "The harbour was quiet ...", "split": "gradient"}``.

    Attributes:
        text: the model's input; the loss is that of predicting it.
        split: ``gradient`` texts give candidates, ``heldout`` ones measure the divergence.
    """

    text: str
    split: Split


def prompt_set_path(name: str, model: str) -> Path:
    """Return the file of a prompt set: a path, a name in profiles/prompts, or for ``auto`` the one that fits the model.

    Raises:
        UserError: neither a file nor a set that ships.
    """
    if name == "auto":
        name = TINY if model == TINY else "general"
        note(f"prompts: {name} (give --prompts for your own)")
    return profile_path("prompts", name, ".jsonl")


def load_prompt_set(path: str | Path) -> list[LanguagePrompt]:
    """Read a prompt set.

    Each line has ``text`` and either all or none have ``split``; without it the last third is held out.

    Raises:
        UserError: fewer than 4 texts, an empty or absent text, an unknown split, a split on some lines only,
            or one of the two splits empty.
    """
    texts: list[str] = []
    splits: list[Split | None] = []
    for where, row in read_jsonl(path):
        text, split = row.get("text"), row.get("split")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: field 'text' must be a text that is not empty, found {text!r}")
        if split is not None and split not in get_args(Split):
            raise UserError(f"{where}: field 'split' must be gradient or heldout, found {split!r}")
        texts.append(text)
        splits.append(split)
    if len(texts) < MIN_PROMPTS:
        raise UserError(f"{path} has {len(texts)} prompts, at least {MIN_PROMPTS} are needed", "add prompts")
    num_without = splits.count(None)
    if num_without == len(texts):
        first_heldout = len(texts) - len(texts) // 3
        splits = ["gradient" if place < first_heldout else "heldout" for place in range(len(texts))]
    elif num_without:
        raise UserError(
            f"{path}: {num_without} of {len(texts)} prompts have no 'split'", "give it on every line or on none"
        )
    for name in get_args(Split):
        if name not in splits:
            raise UserError(f"{path} has no prompt with split '{name}'", f"mark some as {name}, or leave 'split' out")
    return [
        LanguagePrompt(text=text, split=split) for text, split in zip(texts, splits, strict=True) if split is not None
    ]
