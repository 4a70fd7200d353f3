"""The stored tensors of open checkpoints that are parameters: tied copies, constants, and names that match.

Names are converted by ``names.NameMap``; the functions here compare tensors as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from ssrctl.checkpoints.delta import same_bits
from ssrctl.checkpoints.names import is_constant, is_head
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from ssrctl.checkpoints.reader import TensorReader

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Differences of each sort that a message lists.
_LISTED = 3


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


def matching_names(base: TensorReader, tuned: TensorReader) -> tuple[list[str], list[str]]:
    """Return (names to compare, sorted; notes on what was left out); a head that is a tied copy counts once.

    Names that lack the model's prefix on one side get it, and constants that only one side stores are left out.

    Raises:
        UserError: names or shapes that differ, the first of them listed.
    """
    base.align(tuned.shapes)
    tuned.align(base.shapes)
    skipped, notes = set(), []
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
    differences = {
        "only in BASE": [f"{name} only in BASE" for name in sorted(ours - theirs)],
        "only in TUNED": [f"{name} only in TUNED" for name in sorted(theirs - ours)],
        "of another shape": [
            f"{name} is {list(base.shapes[name])} in BASE, {list(tuned.shapes[name])} in TUNED" for name in reshaped
        ],
    }
    if any(differences.values()):
        raise UserError(
            f"{base.label} and {tuned.label} are not the same architecture, {sum(map(len, differences.values()))} "
            f"tensors differ ("
            + ", ".join(f"{len(found)} {sort}" for sort, found in differences.items() if found)
            + f"), of {len(ours | theirs)}: "
            + "; ".join(line for found in differences.values() for line in found[:_LISTED]),
            "compare checkpoints of one model",
        )
    return both, notes
