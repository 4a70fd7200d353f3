"""The judgements of a calibration as scored records, kept so that no paid reply is lost."""

from __future__ import annotations

import contextlib
from typing import Any

from ssrctl.critics.base import should_retry
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.labelled import Labelled
from ssrctl.io.records import Rollout, StepScore
from ssrctl.io.resumable import ResumableOutput
from ssrctl.text.answers import Extraction, check_answer

IDENTITY_FIELD = "critic"
MADE_FIELDS = ("scores", "final")


class Judgements(contextlib.AbstractContextManager["Judgements"]):
    """One row per solution and judgement: the scored record with its ``label`` and ``repeat``; see ``ResumableOutput``.

    The file is again a file of labelled solutions. Leaving the context keeps the rows and says where, unless all were
    written.

    Args:
        path: the finished file.
        identity: name of the critic and its settings.
        reuse: take judgements of earlier runs whose scores need no retry; else every solution is judged again.
        extraction: way of reading final answers.

    Raises:
        UserError: the partial file was written under another identity.

    Attributes:
        num_done: rows that are there.
    """

    def __init__(self, path: str, *, identity: str, reuse: bool, extraction: Extraction) -> None:
        self._output = ResumableOutput(
            path,
            identity=identity,
            identity_field=IDENTITY_FIELD,
            made_fields=MADE_FIELDS,
            is_done=lambda row: reuse and _scores(row) is not None,
        )
        self._extraction = extraction
        self._positions: dict[tuple[int, int], int] = {}
        if self._output.num_others:
            console.warn(
                f"{path} holds {self._output.num_others} judgements made with other settings; they are replaced when this "
                "run is done"
            )

    @property
    def num_done(self) -> int:
        return self._output.num_done

    def earlier(self, given: Labelled, repeat: int) -> list[StepScore] | None:
        """Take the place of one judgement in the file; return its scores if an earlier run made them."""
        row = _input_row(given, repeat)
        position = self._output.reserve(row)
        if position is not None:
            self._positions[id(given), repeat] = position
            return None
        earlier = self._output.earlier_row(row)
        assert earlier is not None
        return _scores(earlier)

    def add(self, given: Labelled, repeat: int, scores: list[StepScore]) -> None:
        """Keep one judgement; it survives a kill from now on.

        Raises:
            UserError: it cannot be written, on a full disk for instance.
        """
        rollout = given.rollout
        assert rollout.response is not None
        rollout.scores = scores
        rollout.final = check_answer(rollout.response, rollout.answer, extraction=self._extraction)
        row = rollout.to_dict()
        rollout.scores = rollout.final = None
        made = {name: row[name] for name in MADE_FIELDS if name in row}
        self._output.add(self._positions.pop((id(given), repeat)), _input_row(given, repeat) | made)

    def finish(self) -> None:
        """Write the finished file, in the order of the input and of the judgements."""
        self._output.finish()

    def __exit__(self, *exc: object) -> None:
        self._output.close()
        if self._output.partial.is_file():
            console.note(f"{self.num_done} judgements are kept in {self._output.partial}")


def _input_row(given: Labelled, repeat: int) -> dict[str, Any]:
    row = given.rollout.to_dict() | {"label": given.label, "repeat": repeat}
    if given.labels is not None:
        row["labels"] = list(given.labels)
    return row if given.final_correct is None else row | {"final_answer_correct": given.final_correct}


def _scores(row: dict[str, Any]) -> list[StepScore] | None:
    """Return the scores of a row, None if it has none or some should be asked for again."""
    try:
        scores = Rollout.from_dict(row, where="").scores
    except UserError:
        return None
    return None if scores is None or should_retry(scores) else scores
