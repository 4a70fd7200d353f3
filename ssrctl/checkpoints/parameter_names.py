"""The stored tensors of open checkpoints that are parameters: tied copies, constants, and names that match.

Names are converted by ``names.NameMap``; the functions here compare tensors as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ssrctl.checkpoints.delta import same_bits
from ssrctl.checkpoints.names import is_constant, is_head
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.checkpoints.reader import TensorReader

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Differences of each sort that a message lists.
_LISTED = 3
# Share of the smaller checkpoint's elements that two have to have in common to be compared.
_LEAST_SHARED = 0.5


def same_constants(base: TensorReader, tuned: TensorReader, names: Collection[str]) -> set[str]:
    """Return those of ``names`` that are constants, bit for bit the same in both checkpoints."""
    found = {name for name in names if is_constant(name) and base.dtypes[name] == tuned.dtypes[name]}
    pieces = {name: zip(base.pieces(name), tuned.pieces(name), strict=True) for name in found}
    return {name for name in found if all(bool(same_bits(a, b).all()) for a, b in pieces[name])}


def tied_embedding(reader: TensorReader, head: str) -> str | None:
    """Return the input embedding of which the stored output head is a bit for bit copy; None when it is not a copy.

    The two are compared once for each open reader.
    """
    stored = reader.name_map.to_file(head)
    if stored not in reader.ties:
        embeddings = (
            name
            for name, shape in reader.shapes.items()
            if _EMBEDDING.search(name) and (shape, reader.dtypes[name]) == (reader.shapes[head], reader.dtypes[head])
        )
        copied = next((name for name in embeddings if _same_tensor(reader, name, head)), None)
        reader.ties[stored] = None if copied is None else reader.name_map.to_file(copied)
    embedding = reader.ties[stored]
    return None if embedding is None else reader.name_map.to_parameter(embedding)


def _same_tensor(reader: TensorReader, one: str, other: str) -> bool:
    return all(bool(same_bits(a, b).all()) for a, b in zip(reader.pieces(one), reader.pieces(other), strict=True))


def tied_copies(reader: TensorReader, names: Collection[str]) -> dict[str, str]:
    """Return {head: embedding} of the heads outside the parameters ``names`` that are stored copies of one of them."""
    heads = [name for name in reader.shapes if name not in names and is_head(name)]
    found = [(head, tied_embedding(reader, head)) for head in heads]
    return {head: embedding for head, embedding in found if embedding is not None and embedding in names}


def matching_names(base: TensorReader, tuned: TensorReader, *, strict: bool = False) -> tuple[list[str], list[str]]:
    """Return (names to compare, sorted; notes on what was left out); a head that is a tied copy counts once.

    Names that lack the model's prefix on one side get it, and constants that only one side stores are left out. Embeddings
    and heads may have another number of rows (a resized vocabulary): they are named, and ``common_rows`` says how many.

    Args:
        base: open; its names may be aligned.
        tuned: likewise; a whole model under another prefix, and matrices that BASE has in one, get the names in BASE.
        strict: refuse every difference.

    Raises:
        UserError: less than half of the smaller side is shared, or ``strict`` and names or shapes that differ.
    """
    base.align(tuned.shapes)
    tuned.align(base.shapes)
    skipped, notes = set(), []
    if not strict:
        notes += _aligned_further(base, tuned)
    for side, one, other in (("BASE", base, tuned), ("TUNED", tuned, base)):
        if prefix := one.name_map.prefix:
            notes.append(f"The names in {side} lack the prefix '{prefix}'; they were compared with it.")
        if constants := {name for name in one.shapes.keys() - other.shapes.keys() if is_constant(name)}:
            skipped |= constants
            notes.append(
                f"Constants that only {side} stores (attention masks, rotary frequencies, position numbers) were left "
                f"out, {len(constants)} in all, first {min(constants)}."
            )
    for head in sorted(filter(is_head, base.shapes.keys() | tuned.shapes.keys())):
        holders = [one for one in (base, tuned) if head in one.shapes]
        if all(tied_embedding(one, head) for one in holders):
            skipped.add(head)
            where = "both" if len(holders) == 2 else "BASE" if holders[0] is base else "TUNED"
            notes.append(f"{head} is stored in {where} as a copy of the embedding (tied) and was counted once.")
    ours, theirs = base.shapes.keys() - skipped, tuned.shapes.keys() - skipped
    both = sorted(ours & theirs)
    reshaped = [name for name in both if base.shapes[name] != tuned.shapes[name]]
    resized = [] if strict else [name for name in reshaped if _only_rows_differ(name, base, tuned)]
    kept = [name for name in both if name not in reshaped or name in resized]
    differences = {
        "only in BASE": [f"{name} only in BASE" for name in sorted(ours - theirs)],
        "only in TUNED": [f"{name} only in TUNED" for name in sorted(theirs - ours)],
        "of another shape": [
            f"{name} is {list(base.shapes[name])} in BASE, {list(tuned.shapes[name])} in TUNED" for name in reshaped
        ],
    }
    shared = sum(math.prod(base.shapes[name][1:]) * common_rows(name, base, tuned) for name in kept)
    smaller = min(sum(math.prod(one.shapes[name]) for name in held) for one, held in ((base, ours), (tuned, theirs)))
    if any(differences.values()) and (strict or shared < _LEAST_SHARED * smaller):
        quantised = next((one for one in (base, tuned) if one.quantization is not None), None)
        raise UserError(
            f"{base.label} and {tuned.label} are not the same architecture, {sum(map(len, differences.values()))} "
            f"tensors differ ("
            + ", ".join(f"{len(found)} {sort}" for sort, found in differences.items() if found)
            + f"), of {len(ours | theirs)}: "
            + "; ".join(line for found in differences.values() for line in found[:_LISTED]),
            "compare checkpoints of one model"
            if quantised is None
            else f"{quantised.label} is quantised ({quantised.quantization}): dequantise it first (from_pretrained, "
            "dequantize, save_pretrained)",
        )
    for name in resized:
        notes.append(
            f"{name} has {base.shapes[name][0]} rows in BASE and {tuned.shapes[name][0]} in TUNED: the first "
            f"{common_rows(name, base, tuned)} were compared."
        )
    for sort, found in (
        ("only in BASE", sorted(ours - theirs)),
        ("only in TUNED", sorted(theirs - ours)),
        ("of another shape", [name for name in reshaped if name not in resized]),
    ):
        if found:
            first = ", ".join(found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
            notes.append(f"Left out, {sort}: {len(found)} of {len(ours | theirs)} tensors ({first}).")
    return kept, notes


def one_sided_weights(base: TensorReader, tuned: TensorReader, matched: Collection[str]) -> set[str]:
    """Return the names of weights that ``matching_names`` left out, or of which one side has more rows.

    Constants, and heads that are tied copies, are none.
    """
    others = {
        name
        for name in (base.shapes.keys() | tuned.shapes.keys()) - set(matched)
        if not is_constant(name)
        and not (is_head(name) and all(tied_embedding(one, name) for one in (base, tuned) if name in one.shapes))
    }
    return others | {name for name in matched if base.shapes[name] != tuned.shapes[name]}


def common_rows(name: str, base: TensorReader, tuned: TensorReader) -> int:
    """Return the rows that a tensor has in both checkpoints; 1 for a single number."""
    return min(one.shapes[name][0] if one.shapes[name] else 1 for one in (base, tuned))


def _only_rows_differ(name: str, base: TensorReader, tuned: TensorReader) -> bool:
    """Return True for an embedding or head whose vocabulary was resized."""
    a, b = base.shapes[name], tuned.shapes[name]
    return len(a) == len(b) == 2 and a[1] == b[1] and bool(_EMBEDDING.search(name) or is_head(name))


def _aligned_further(base: TensorReader, tuned: TensorReader) -> list[str]:
    """Give TUNED the names in BASE where another prefix or matrices in one keep them apart; returns notes."""
    notes = []
    if len(base.shapes.keys() & tuned.shapes.keys()) * 2 < min(len(base.shapes), len(tuned.shapes)):
        replaced = tuned.align_prefix(base.shapes)
        if replaced is not None:
            notes.append(f"Names that begin with '{replaced[0]}' in TUNED begin with '{replaced[1]}' in BASE.")
    for side, one, other in (("BASE", base, tuned), ("TUNED", tuned, base)):
        if joined := one.join_rows(other.shapes):
            notes.append(f"{len(joined)} tensors were put together from several in {side}, first {joined[0]}.")
    return notes


def paired_pieces(base: Iterator[Tensor], tuned: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (base, tuned) for flat pieces of a tensor, in the base's shape; rows that TUNED lacks are the base's.

    Both come in pieces of one size, and the shorter side ends early.
    """
    import torch

    dtype = None
    for ours in base:
        theirs = next(tuned, None)
        if theirs is None:
            theirs = ours if dtype is None else ours.to(dtype)
        elif theirs.numel() < ours.numel():
            theirs = torch.cat([theirs, ours[theirs.numel() :].to(theirs.dtype)])
        dtype = theirs.dtype
        yield ours, theirs[: ours.numel()]
