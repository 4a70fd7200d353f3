"""Words of the form BASE:TUNED, whose halves may have colons of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ssrctl.configs import TINY
from ssrctl.errors import UserError
from ssrctl.io.hub import is_address


def split_pairs(words: Sequence[str]) -> list[tuple[Path, Path]]:
    """Return (base, checkpoint) of each word, in order; see ``split_pair``.

    Raises:
        UserError: a word that is not a pair, or a pair that occurs twice.
    """
    pairs: dict[tuple[str, str], tuple[Path, Path]] = {}
    for word in words:
        base, tuned = split_pair(word)
        key = (os.path.realpath(base), os.path.realpath(tuned))
        if key in pairs:
            raise UserError(f"--pairs: {word} occurs twice", "give each pair once")
        pairs[key] = (base, tuned)
    return list(pairs.values())


def split_pair(word: str) -> tuple[Path, Path]:
    """Split ``BASE:TUNED`` at the colon with a path, or a model's name, on both sides.

    A single colon separates the two whatever they are. Of several colons (``C:/base:C:/tuned``, folders with a colon
    in their names) the one is taken that has something that exists on both sides; where there is none, one that leaves
    a name on the hub in place of what does not exist.

    Raises:
        UserError: no colon, nothing on one side of it, or several colons of which none or more than one fits.
    """
    usage = "ssrctl diagnose --pairs BASE:TUNED BASE:TUNED ..."
    splits = [(word[:place], word[place + 1 :]) for place, letter in enumerate(word) if letter == ":"]
    if not splits:
        raise UserError(f"--pairs: {word!r} is not BASE:TUNED, it has no colon", usage)
    halves = [(base, tuned) for base, tuned in splits if base.strip() and tuned.strip()]
    if not halves:
        missing = "TUNED after" if splits[0][0].strip() else "BASE before"
        raise UserError(f"--pairs: {word!r} has no {missing} the colon", usage)
    if len(splits) == 1:
        return Path(halves[0][0]), Path(halves[0][1])
    for fits in (_exists, _is_named):
        found = [(base, tuned) for base, tuned in halves if fits(base) and fits(tuned)]
        if len(found) > 1:
            read = " and ".join(f"{base!r} with {tuned!r}" for base, tuned in found)
            raise UserError(
                f"--pairs: {word!r} can be read as {read}", "name one of them by a link without a colon in its name"
            )
        if found:
            return Path(found[0][0]), Path(found[0][1])
    raise UserError(
        f"--pairs: {word!r} has {len(splits)} colons, and none has a path or a model's name on both sides",
        "check the paths; a revision of a model on the hub is OWNER/NAME@REVISION",
    )


def _exists(half: str) -> bool:
    return half == TINY or os.path.exists(half)  # noqa: PTH110 (Path.exists raises for names that are too long)


def _is_named(half: str) -> bool:
    return _exists(half) or is_address(half)
