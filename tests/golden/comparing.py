"""What differs between two recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HASHES = ("sha256:", "xxh3:")
Leaf = str | int | float | bool | None


@dataclass
class Differences:
    """Lines to print.

    Attributes:
        exact: numbers and hashes that differ, and jobs or files that only one recording has.
        text: texts that differ.
        moved: places whose numbers are the same under other names; only with ``leaves``.
        compared: how many numbers and hashes were compared.
    """

    exact: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    compared: int = 0


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, leaves: bool) -> Differences:
    """Compare the jobs of two recordings, number by number.

    Args:
        old: job -> what was kept of it.
        new: the same of the other recording.
        leaves: where the names of a file's values differ, compare the numbers under each of its top-level keys as
            a bag, and those under keys that only one side has as one bag.
    """
    found = Differences()
    for job in sorted(old.keys() | new.keys()):
        if job not in old or job not in new:
            found.exact.append(f"{job}: only in {'OLD' if job in old else 'NEW'}")
            continue
        before, after = _parts(old[job]), _parts(new[job])
        for part in sorted(before.keys() | after.keys()):
            if part not in before or part not in after:
                found.exact.append(f"{job}: {part}: only in {'OLD' if part in before else 'NEW'}")
                continue
            _compare_part(f"{job}: {part}", before[part], after[part], found, leaves)
    return found


def _parts(job: Mapping[str, Any]) -> dict[str, Any]:
    return {key: held for key, held in job.items() if key != "files"} | dict(job["files"])


def _compare_part(where: str, old: Any, new: Any, found: Differences, leaves: bool) -> None:
    before, after = dict(_walk(old)), dict(_walk(new))
    found.compared += sum(_is_exact(leaf) for leaf in after.values())
    exact = []
    for path in [*before, *(path for path in after if path not in before)]:
        pair = [side.get(path, _MISSING) for side in (before, after)]
        if _same(*pair):
            continue
        line = f"{where}: {path or 'value'}: {_shown(pair[0])} -> {_shown(pair[1])}"
        (exact if any(_is_exact(leaf) for leaf in pair) else found.text).append(line)
    if not (exact and leaves):
        found.exact += exact
        return
    lost = _bags(old, new, where)
    found.exact += lost
    if not lost:
        found.moved.append(f"{where}: {len(exact)} values under other names")


def _bags(old: Any, new: Any, where: str) -> list[str]:
    """Lines for every number that one side has more often than the other, under each top-level key."""
    before, after = (side if isinstance(side, dict) else {"value": side} for side in (old, new))
    shared = [key for key in before if key in after]
    pairs = [(key, {key: before[key]}, {key: after[key]}) for key in shared]
    rest = [{key: held for key, held in side.items() if key not in shared} for side in (before, after)]
    pairs.append((" + ".join(sorted(rest[0])) + " => " + " + ".join(sorted(rest[1])), rest[0], rest[1]))
    lines = []
    for key, one, other in pairs:
        counts = [Counter(_shown(leaf) for _, leaf in _walk(side) if _is_exact(leaf)) for side in (one, other)]
        for label, extra in (("OLD", counts[0] - counts[1]), ("NEW", counts[1] - counts[0])):
            lines += [f"{where}: {key}: only in {label}: {leaf} ({n} times)" for leaf, n in sorted(extra.items())]
    return lines


class _Missing:
    def __repr__(self) -> str:
        return "(nothing)"


_MISSING = _Missing()


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, dict):
        for key, held in value.items():
            yield from _walk(held, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, held in enumerate(value):
            yield from _walk(held, f"{path}[{index}]")
    else:
        yield path, value


def _is_exact(leaf: object) -> bool:
    """Whether a leaf is a number or a hash, rather than text or missing."""
    if isinstance(leaf, str):
        return leaf.startswith(HASHES)
    return leaf is None or isinstance(leaf, bool | int | float)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)


def _shown(leaf: object) -> str:
    return repr(leaf)
