"""Diversity of response formats: the patterns of steps that a model writes in, and how often it uses each.

Training that concentrates on one way of writing shows here before it shows in accuracy: the number of patterns falls, and
with it the entropy of their distribution.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssrctl.io.records import Rollout
from ssrctl.text.segment import segment

NUM_PERMUTATIONS = 2000
_BATCH = 100  # permutations at a time, which bounds the memory
# Every repetition is bounded: a response may be one long run of any character.
_OPENINGS = {
    "think": re.compile(r"<think>|\[THINK\]", re.IGNORECASE),
    "heading": re.compile(r"#{1,6}[ \t]{1,8}[^\s\d]|\*\*[^*\n]{1,80}\*\*:?[ \t]{0,8}$", re.MULTILINE),
    "step": re.compile(r"\W{0,4}step\s{1,3}\d", re.IGNORECASE),
    "number": re.compile(r"\(?\d{1,3}[.)]\s|\([a-z]\)\s"),
    "bullet": re.compile(r"[-*•]\s"),
}
_CONTENTS = {
    "code": re.compile(r"```"),
    "table": re.compile(r"^[ \t]{0,8}\|", re.MULTILINE),
    "maths": re.compile(r"\$|\\[(\[]"),
    "equation": re.compile(r"\d[^=\n]{0,80}=|=[^=\n]{0,80}\d"),
    "words": re.compile(r"[^\W\d_]{2}\W{1,8}[^\W\d_]{2}"),
}


def step_pattern(text: str) -> str:
    """Return the pattern of a step: its opening and contents, such as ``number equation words``; ``other`` without any."""
    text = text.lstrip()
    opening = next((name for name, form in _OPENINGS.items() if form.match(text)), None)
    found = [name for name, form in _CONTENTS.items() if form.search(text)]
    return " ".join([*([opening] if opening else []), *found]) or "other"


def signature(rollout: Rollout) -> str | None:
    """Return the patterns of a response's steps in order; neighbours with the same pattern count once.

    Steps are the record's, else those of ``segment``; the final one also says how the answer is marked. An empty response
    has the signature ``empty``; without a response it is None.
    """
    if rollout.response is None:
        return None
    steps = rollout.steps or segment(rollout.response)
    patterns = [
        ("final " if step.kind == "final" else "") + step_pattern(rollout.response[step.start : step.end])
        for step in steps
    ]
    parts = [pattern for pattern, _ in itertools.groupby(patterns)]
    if parts and rollout.final is not None and rollout.final.way is not None:
        parts[-1] += f" ({rollout.final.way})"
    return ", ".join(parts) or "empty"


@dataclass(frozen=True)
class FormatDiversity:
    """The signatures of a set of responses.

    Attributes:
        num_responses: responses with a signature, at least 1.
        distinct: different signatures among them.
        entropy: of their distribution, in bits: 0 for one signature, log2 of the number of responses at most.
        largest_frac: share of the most frequent one.
        largest: that signature; of equally frequent ones the alphabetically first.
    """

    num_responses: int
    distinct: int
    entropy: float
    largest_frac: float
    largest: str

    @classmethod
    def of(cls, signatures: Sequence[str]) -> FormatDiversity:
        """Count signatures, at least one."""
        counts = Counter(signatures)
        largest, most = min(counts.items(), key=lambda item: (-item[1], item[0]))
        total = len(signatures)
        return cls(total, len(counts), entropy_of(list(counts.values())), most / total, largest)


def entropy_of(counts: Sequence[int]) -> float:
    """Return the entropy in bits of the shares of counts, at least one of them above 0."""
    total = sum(counts)
    return max(0.0, -math.fsum(count / total * math.log2(count / total) for count in counts if count))


def compare_formats(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Compare the signatures of two evaluations of the same problems.

    Distinct signatures and entropies grow with the number of responses, so that of each problem the same number counts, its
    first ones. The test exchanges the two evaluations' responses of a problem at random (2,000 times, with a fixed seed):
    where training changed nothing, each exchange is as likely as what was seen.

    Args:
        before, after: by problem, the signatures of its responses; problems in only one of them are left out.

    Returns:
        ``baseline`` and ``evaluation`` (see ``FormatDiversity``), ``entropy_difference`` in bits, and the two-sided
        ``p_value``; None without a problem in both.
    """
    shared = {
        problem: fewest
        for problem in sorted(before.keys() & after.keys())
        if (fewest := min(len(before[problem]), len(after[problem])))
    }
    if not shared:
        return None
    first = [list(before[problem][:count]) for problem, count in shared.items()]
    second = [list(after[problem][:count]) for problem, count in shared.items()]
    old, new = (FormatDiversity.of(list(itertools.chain(*one))) for one in (first, second))
    return {
        "baseline": asdict(old),
        "evaluation": asdict(new),
        "entropy_difference": new.entropy - old.entropy,
        "p_value": _p_value(first, second),
    }


def _p_value(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> float:
    """Return the p-value of the difference of entropies under exchanges of a problem's responses."""
    import numpy as np

    column = {name: place for place, name in enumerate(dict.fromkeys(itertools.chain(*first, *second)))}
    counts = np.zeros((2, len(first), len(column)))
    for side, rows in enumerate((first, second)):
        for place, row in enumerate(rows):
            for name in row:
                counts[side, place, column[name]] += 1
    moved, generator = counts[1] - counts[0], np.random.default_rng(0)
    totals = counts.sum(axis=1)

    def difference(exchanged: Any) -> Any:
        """Return the differences of entropies where the problems with 1 in ``exchanged [n, problems]`` are exchanged."""
        shift = exchanged @ moved
        entropies = []
        for part in (totals[0] + shift, totals[1] - shift):
            shares = part / totals[0].sum()
            logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
            entropies.append(-(shares * logs).sum(axis=1))
        return entropies[1] - entropies[0]

    seen = abs(difference(np.zeros((1, len(first))))[0])
    as_large = 0
    for _ in range(NUM_PERMUTATIONS // _BATCH):
        exchanged = generator.integers(0, 2, (_BATCH, len(first))).astype(float)
        as_large += int((abs(difference(exchanged)) >= seen - 1e-9).sum())
    return (1 + as_large) / (1 + NUM_PERMUTATIONS)
