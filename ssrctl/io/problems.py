"""Problems to train or evaluate on, from the bundled generator, a local file, or the hub."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ssrctl.configs import TINY_DATASET, DatasetConfig
from ssrctl.errors import UserError
from ssrctl.io.files import FULL, CannotWrite
from ssrctl.io.jsonl import STDIO, read_jsonl

Purpose = Literal["train", "test"]
QUESTION_COLUMNS = ("question", "problem", "prompt", "input", "Question")
ANSWER_COLUMNS = ("answer", "target", "Answer")
BUNDLED_SIZES = {"train": 2000, "test": 256}
_FILE_FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer.

    Attributes:
        id: unique within the data set.
        question: as text.
        answer: only the final answer; of a solution that ends in ``#### 42`` (as GSM8K's), the part after it.
        extra: the row's other columns, kept in every record made from it.
    """

    id: str
    question: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


def load_problems(config: DatasetConfig, purpose: Purpose, seed: int = 0) -> list[Problem]:
    """Load the problems of ``config.dataset``, at most ``config.limit`` of them.

    Args:
        config: data set, split and columns.
        purpose: chooses the split where the config names none: train, or the held-out one.
        seed: of the bundled generator.

    Raises:
        UserError: not found, not readable, a row without question or answer (line and field are named), or
            nothing in it.
    """
    if config.dataset == TINY_DATASET:
        rows = _bundled(config, purpose, seed)
    elif config.dataset.endswith((".jsonl", ".ndjson")) or config.dataset == STDIO:
        if config.dataset_split or config.dataset_config:
            raise UserError(
                f"{config.dataset} is one jsonl file: it has no splits or configurations",
                "leave out --dataset-split and --dataset-config",
            )
        rows = read_jsonl(config.dataset if config.dataset == STDIO else Path(config.dataset).expanduser())
    else:
        rows = _from_datasets(config, purpose)
    problems = [_problem(where, row, config) for where, row in islice(rows, config.limit)]
    if not problems:
        raise UserError(f"{config.dataset}: no problems in it")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(
                f"{config.dataset}: the id '{problem.id}' occurs twice", "make ids unique or leave them out"
            )
        seen.add(problem.id)
    return problems


def _bundled(config: DatasetConfig, purpose: Purpose, seed: int) -> Iterable[tuple[str, dict[str, Any]]]:
    from ssrctl.tiny_reasoner.problems import problems

    split = config.dataset_split or {"train": "train", "test": "heldout"}[purpose]
    if split not in ("train", "heldout"):
        raise UserError(f"{TINY_DATASET} has the splits train and heldout, not '{split}'")
    made = problems(split, config.limit or BUNDLED_SIZES[purpose], seed)  # type: ignore[arg-type]
    return [(f"{TINY_DATASET}:{split}:{p.id}", p.to_record()) for p in made]


def _from_datasets(config: DatasetConfig, purpose: Purpose) -> Iterable[tuple[str, dict[str, Any]]]:
    """Load anything that the datasets library reads: csv, json, parquet, a folder, a name on the hub."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(config.dataset).expanduser()
    kind = _FILE_FORMATS.get(path.suffix)
    if (kind or path.is_absolute() or config.dataset.startswith((".", "~"))) and not path.exists():
        raise UserError(f"dataset not found: {config.dataset}", "check the path")
    split = config.dataset_split or ("train" if kind else purpose)
    try:
        if kind:
            loaded = datasets.load_dataset(kind, data_files=str(path), split=split)
        else:
            loaded = datasets.load_dataset(str(config.dataset), config.dataset_config, split=split)
    except Exception as error:  # datasets raises whatever its readers and its http client raise
        if _is_full(error):
            raise CannotWrite(
                f"dataset '{config.dataset}' cannot be stored in the cache of datasets, {datasets.config.HF_DATASETS_CACHE}: "
                "no space left",
                "make room, or set HF_DATASETS_CACHE to a folder on another disk, and run the same command again",
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"dataset '{config.dataset}' (split {split}) cannot be loaded: {reason[0]}",
            "give a local jsonl, csv, json or parquet file, or check the name, --dataset-split and the network",
        ) from error
    return ((f"{config.dataset}:{number}", row) for number, row in enumerate(loaded, start=1))


def _is_full(error: BaseException) -> bool:
    """Return True if a full disk caused an error, which datasets and pyarrow wrap in classes of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in FULL) or os.strerror(errno.ENOSPC) in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _problem(where: str, row: dict[str, Any], config: DatasetConfig) -> Problem:
    question = _column(row, config.question_column, QUESTION_COLUMNS, where, "question")
    answer = _column(row, config.answer_column, ANSWER_COLUMNS, where, "answer")
    used = {"id", question, answer}
    text = _answer_text(row[answer], f"{where}: field '{answer}'")
    identity = row.get("id")
    return Problem(
        id=where.rsplit(":", 1)[-1] if identity is None else str(identity),
        question=str(row[question]),
        answer=text.rsplit("####", 1)[-1].strip() if "####" in text else text.strip(),
        extra={key: value for key, value in row.items() if key not in used and _is_json(value)},
    )


def _answer_text(value: Any, where: str) -> str:
    """Return an answer as text; a list of one is its element. Any other list or a dict is a UserError."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | dict):
        raise UserError(
            f"{where} must be text or a number, found {value!r}", "name another column with --answer-column"
        )
    return str(value)


def _column(row: dict[str, Any], named: str | None, usual: tuple[str, ...], where: str, what: str) -> str:
    candidates = (named,) if named else usual
    for name in candidates:
        if row.get(name) is not None and str(row[name]).strip():
            return name
    raise UserError(
        f"{where}: no {what}: field {' or '.join(repr(name) for name in candidates)} is missing or empty",
        f"the row has {', '.join(row) or 'no fields'}; name the right one with --{what}-column",
    )


def _is_json(value: Any) -> bool:
    """Return True if records can hold the value: not a date, bytes, or a NaN in a column of floats."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
