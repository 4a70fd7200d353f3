"""Details of lighteval (``--save-details``, ``details_*.parquet``) of tasks that generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError, first_line
from ssrctl.io.files import existing_file
from ssrctl.io.formats.base import Format, Row, is_texts, numbering
from ssrctl.io.row_fields import final_answer, is_empty, read_answer

SUFFIX = ".parquet"
_BATCH = 256  # rows of a parquet file in memory


def parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` of a parquet file.

    Raises:
        UserError: not found, or not a whole parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    existing_file(path, "file of records")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file: {first_line(error)}", "write it again") from error


def _fits(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("doc"), dict) and isinstance(row.get("model_response"), dict)


def _reader() -> Callable[[Row, str], list[Row]]:
    number = numbering()
    return lambda row, where: number(str(row["doc"].get("id") or where.rsplit(" ", 1)[-1]), _read(row, where))


def _read(row: Row, where: str) -> list[Row]:
    doc, answered = row["doc"], row["model_response"]
    texts = answered.get("text")
    if not is_texts(texts):
        raise UserError(
            f"{where}: field 'model_response.text' holds no generated text",
            "only tasks that generate text have responses to read",
        )
    made: Row = {"question": doc.get("query")}
    if not is_empty(doc.get("specific")):
        made["specific"] = doc["specific"]
    if not is_empty(row.get("metric")):
        made["metric"] = row["metric"]
    gold = _gold(doc, where)
    if gold:
        answer = read_answer(gold, where, "doc.choices")
        made["answer"] = final_answer(answer) if isinstance(answer, str) else answer
    tokens = answered.get("output_tokens")
    lengths = [len(one) if isinstance(one, list) else None for one in tokens] if isinstance(tokens, list) else []
    return [
        made | {"response": text} | ({"num_tokens": lengths[place]} if place < len(lengths) and lengths[place] else {})
        for place, text in enumerate(texts)
    ]


def _gold(doc: Mapping[str, Any], where: str) -> list[Any]:
    """Return the choices that count as right."""
    choices, index = doc.get("choices"), doc.get("gold_index")
    if not isinstance(choices, list):
        return []
    places: list[Any] = index if isinstance(index, list) else [index]
    if not all(type(place) is int and 0 <= place < len(choices) for place in places):
        raise UserError(f"{where}: field 'doc.gold_index' must number the {len(choices)} choices")
    return [choices[place] for place in places]


LIGHTEVAL = Format(name="lighteval", fields=("doc", "model_response"), fits=_fits, reader=_reader)
