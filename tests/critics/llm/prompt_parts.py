"""A reader of the llm critic's prompts that knows their form from docs/critics.md alone; for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssrctl.io.records import Rollout, StepSpan


@dataclass(frozen=True)
class Parts:
    """A user message taken apart: its code, the sections (name, text) before each ``end``, and what stands between."""

    code: str
    opening: str
    sections: list[tuple[str, str]]
    closings: list[str]


def parts_of(user: str) -> Parts:
    """Read a user message line by line; fails on a code anywhere but in the first line and in headings."""
    lines = user.split("\n")
    code = re.findall(r"\b[0-9a-f]{16}\b", lines[0])
    assert len(code) == 1, lines[0]
    (code,) = code
    sections: list[tuple[str, list[str]]] = []
    closings: list[list[str]] = []
    inside = False
    opening: list[str] = [lines[0]]
    for line in lines[1:]:
        heading = re.fullmatch(
            rf"\[{code} (problem|reference answer|(?:earlier )?step \d+|final \d+|earlier reply|end)\]", line
        )
        if heading is None:
            assert code not in line, line
            if inside:
                sections[-1][1].append(line)
            else:
                (closings[-1] if closings else opening).append(line)
        elif heading.group(1) == "end":
            assert inside
            inside = False
            closings.append([])
        else:
            inside = True
            sections.append((heading.group(1), []))
    assert not inside, "the data never end"
    return Parts(
        code, "\n".join(opening), [(name, "\n".join(text)) for name, text in sections], ["\n".join(c) for c in closings]
    )


def make_rollout(*texts: str, question: str = "48*6-2=?", answer: str | None = None, last: str = "final") -> Rollout:
    """A rollout with these step texts, the last one of kind ``last``."""
    steps, place = [], 0
    for text in texts:
        steps.append(StepSpan(start=place, end=place + len(text)))
        place += len(text)
    if steps:
        steps[-1].kind = last
    return Rollout(id="a/0", question=question, answer=answer, response="".join(texts), steps=steps)
