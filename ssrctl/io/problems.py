"""Problems to train or evaluate on, from the bundled generator, a local file, or the hub."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from ssrctl.configs import TINY_DATASET, DatasetConfig, is_bundled
from ssrctl.errors import UserError, first_line
from ssrctl.io.files import FULL, CannotWrite
from ssrctl.io.row_fields import (
    Message,
    Reference,
    final_answer,
    is_empty,
    is_messages,
    lookup,
    messages_of_row,
    read_answer,
    read_text,
    shown,
)
from ssrctl.io.tables import STDIO, is_file_name, read_rows

Purpose = Literal["train", "test"]
QUESTION_COLUMNS = ("question", "problem", "prompt", "input", "Question", "Problem", "messages")
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "ground_truth",
    "target",
    "Answer",
    "reward_model.ground_truth",
    "solution",
    "Solution",
    "extra_info.answer",
)
# Columns of worked solutions: several lines without a marked final answer are not an answer.
_WORKED = ("solution", "Solution", "extra_info.answer")
BUNDLED_SIZES = {"train": 2000, "test": 256}
# The variant of the bundled problems that holds all others, and the category there of the problems without a variant.
PROBES, IN_DISTRIBUTION = "probes", "in-distribution"


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer.

    Attributes:
        id: unique within the data set.
        question: as text; of chat messages, the content of the last one.
        answer: only the final answer; of a solution that ends in ``#### 42`` (as GSM8K's) or has a ``\\boxed{42}``, that
            part. A tuple where several answers are accepted.
        extra: the row's other columns, kept in every record made from it.
        messages: the chat messages of a row that has them instead of a plain question.
    """

    id: str
    question: str
    answer: Reference
    extra: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] | None = None


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
    if is_bundled(config.dataset):
        rows = _bundled(config, purpose, seed)
    elif config.dataset == STDIO or is_file_name(config.dataset):
        if config.dataset_split or config.dataset_config:
            raise UserError(
                f"{config.dataset} is one file: it has no splits or configurations",
                "leave out --dataset-split and --dataset-config",
            )
        rows = read_rows(config.dataset)
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
    """Generate the bundled problems, or those of a variant; of ``probes`` all of them in turn, with their ``category``."""
    from ssrctl.tiny_reasoner.problems import Variant, problems

    split = config.dataset_split or {"train": "train", "test": "heldout"}[purpose]
    if split not in ("train", "heldout"):
        raise UserError(f"{config.dataset} has the splits train and heldout, not '{split}'")
    variants = get_args(Variant)
    name = config.dataset.partition(":")[2]
    if name not in ("", PROBES, *variants):
        raise UserError(
            f"{TINY_DATASET} has no variant '{name}'",
            f"use {TINY_DATASET} or {TINY_DATASET}: with one of {', '.join((*variants, PROBES))}",
        )
    parts = [None, *variants] if name == PROBES else [name or None]
    count = config.limit or BUNDLED_SIZES[purpose]
    made = [problems(split, count, seed, variant=part) for part in parts]  # type: ignore[arg-type]
    for of_each in zip(*made, strict=True):
        for part, problem in zip(parts, of_each, strict=True):
            row = problem.to_record() | ({"category": part or IN_DISTRIBUTION} if name == PROBES else {})
            yield f"{config.dataset}:{split}:{problem.id}", row


def _from_datasets(config: DatasetConfig, purpose: Purpose) -> Iterator[tuple[str, dict[str, Any]]]:
    """Load a parquet file, a folder or a name on the hub with the datasets library."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(config.dataset).expanduser()
    is_parquet = path.suffix == ".parquet"
    if (is_parquet or path.is_absolute() or config.dataset.startswith((".", "~"))) and not path.exists():
        raise UserError(f"dataset not found: {config.dataset}", "check the path")
    if path.is_file() and not is_parquet:
        raise UserError(
            f"{config.dataset} is a file of a kind that is not read",
            "give a jsonl, ndjson, json, csv or tsv file (also with .gz), or a parquet file",
        )
    split = config.dataset_split or ("train" if is_parquet else purpose)
    try:
        if is_parquet:
            loaded = datasets.load_dataset("parquet", data_files=str(path), split=split)
        else:
            loaded = datasets.load_dataset(str(config.dataset), config.dataset_config, split=split)
    except Exception as error:  # datasets raises whatever its readers and its http client raise
        if _is_full(error):
            raise CannotWrite(
                f"dataset '{config.dataset}' cannot be stored in the cache of datasets, {datasets.config.HF_DATASETS_CACHE}: "
                "no space left",
                "make room, or set HF_DATASETS_CACHE to a folder on another disk, and run the same command again",
            ) from error
        raise UserError(
            f"dataset '{config.dataset}' (split {split}) cannot be loaded: {first_line(error)}",
            "give a local jsonl, json, csv, tsv or parquet file, or check the name, --dataset-split and the network",
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
    usual = ("prompt", *QUESTION_COLUMNS) if is_messages(row.get("prompt")) else QUESTION_COLUMNS
    question = _column(row, config.question_column, usual, where, "question")
    answer = _column(row, config.answer_column, ANSWER_COLUMNS, where, "answer")
    messages = messages_of_row(row, question, where)
    text = read_text(lookup(row, question, where), where, question) if messages is None else messages[-1]["content"]
    if not text.strip():
        raise UserError(f"{where}: the last message of field '{question}' is empty", "fix or remove that row")
    identity = row.get("id")
    if not isinstance(identity, str | int | None) or isinstance(identity, bool):
        raise UserError(f"{where}: field 'id' must be text or an integer, found {shown(identity)}")
    used = {"id", question, answer}
    return Problem(
        id=where.rsplit(":", 1)[-1].removeprefix("row ") if identity is None else str(identity),
        question=text,
        answer=_answer(row, answer, where),
        extra={key: value for key, value in row.items() if key not in used and _is_json(value)},
        messages=None if messages is None else tuple(messages),
    )


def _answer(row: dict[str, Any], name: str, where: str) -> Reference:
    given = read_answer(lookup(row, name, where), where, name)
    found = []
    for text in (given,) if isinstance(given, str) else given:
        final = final_answer(text)
        if name in _WORKED and final == text.strip() and "\n" in final:
            raise UserError(
                f"{where}: the solution in field '{name}' marks no final answer (\\boxed{{...}} or ####)",
                "name the column that holds the answers with --answer-column",
            )
        if not final:
            raise UserError(f"{where}: no answer after the #### in field '{name}'", "fix or remove that row")
        found.append(final)
    return found[0] if isinstance(given, str) else tuple(found)


def _column(row: dict[str, Any], named: str | None, usual: tuple[str, ...], where: str, what: str) -> str:
    candidates = (named,) if named else usual
    for name in candidates:
        if not is_empty(lookup(row, name, where)):
            return name
    raise UserError(
        f"{where}: no {what}: field {' or '.join(repr(name) for name in candidates)} is missing or empty",
        f"the row has {', '.join(map(str, row))[:300] or 'no fields'}; name the right one with --{what}-column",
    )


def _is_json(value: Any) -> bool:
    """Return True if records can hold the value: not a date, bytes, or a NaN in a column of floats."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
