"""Responses as pages show them: one right and one wrong, with their steps coloured by reward."""

from __future__ import annotations

from collections.abc import Iterable

from ssrctl.io.records import Rollout
from ssrctl.report.document import Transcript

# Characters of a question and a response on the page.
_MOST_QUESTION, _MOST_RESPONSE = 600, 6000


def first_of_each(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return the first right and the first wrong rollout, as far as there are any; read no further."""
    found: dict[bool, Rollout] = {}
    for one in rollouts:
        if one.response is not None and one.final is not None and one.final.correct is not None:
            found.setdefault(one.final.correct, one)
        if len(found) == 2:
            break
    return [found[correct] for correct in sorted(found, reverse=True)]


def transcript(rollout: Rollout, title: str) -> Transcript:
    """Return a response with its steps coloured by their rewards, long texts cut."""
    assert rollout.response is not None
    spans = rollout.steps or []
    rewards = [one.reward for one in rollout.scores or []] or [None] * len(spans)
    parts = [
        (rollout.step_text(place), reward) for place, (_, reward) in enumerate(zip(spans, rewards, strict=False))
    ] or [(rollout.response, None)]
    kept: list[tuple[str, float | None]] = []
    left = _MOST_RESPONSE
    for text, reward in parts:
        kept.append((text[:left], reward))
        left -= len(text)
        if left <= 0:
            kept.append((" …", None))
            break
    question = rollout.question or ""
    return Transcript(
        title=title,
        question=question[:_MOST_QUESTION] + (" …" if len(question) > _MOST_QUESTION else ""),
        parts=kept,
    )
