"""Names in a file and names of parameters: prefixes, tied heads and constants, the one place that knows about them.

Training knows a model by its ``named_parameters``: a tied tensor once, no buffers, with the model's prefix. A file may
lack the prefix (the hub's GPT-2 holds ``wte.weight`` where ``save_pretrained`` writes ``transformer.wte.weight``), hold
a copy of the embedding as output head, and constants such as causal masks. ``NameMap`` converts names in both
directions; the functions below it say which of a file's tensors are copies or constants.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ssrctl.checkpoints.delta import same_bits
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from ssrctl.checkpoints.reader import TensorReader

_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Constants that older files store next to the weights: causal masks, rotary frequencies, position numbers.
_CONSTANT = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
# Differences of each sort that a message lists.
_LISTED = 3


@dataclass(frozen=True)
class NameMap:
    """Two-way map between the tensor names in a file and parameter names; without entries names are the same.

    Example::

        names = NameMap.between(["wte.weight"], ["transformer.wte.weight"])
        names.to_parameter("wte.weight")  # "transformer.wte.weight"
        names.to_file("transformer.wte.weight")  # "wte.weight"

    Attributes:
        prefix: what the file's names lack; empty when they lack nothing.
        renamed: {name in the file: parameter name}, of the names that differ.
    """

    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def between(cls, stored: Collection[str], parameters: Collection[str]) -> NameMap:
        """Return the map from a file's names to ``parameters``.

        A prefix is added only when no name but that of the head (which has no prefix in the model either) agrees
        without it; of several prefixes the one that most names agree with is taken.
        """
        body = [name for name in stored if not is_head(name)]
        if any(name in parameters for name in body):
            return cls()
        prefixes = sorted({name.partition(".")[0] + "." for name in parameters})
        hits = {prefix: sum(prefix + name in parameters for name in body) for prefix in prefixes}
        prefix = max(prefixes, key=hits.__getitem__, default="")
        if not hits.get(prefix):
            return cls()
        return cls(prefix, {name: prefix + name for name in stored if prefix + name in parameters})

    @functools.cached_property
    def _stored(self) -> dict[str, str]:
        return {parameter: stored for stored, parameter in self.renamed.items()}

    def to_parameter(self, name: str) -> str:
        """Return the parameter name of a tensor in the file."""
        return self.renamed.get(name, name)

    def to_file(self, name: str) -> str:
        """Return the name in the file of a parameter."""
        return self._stored.get(name, name)


def is_head(name: str) -> bool:
    """Return True for the output head's matrix."""
    return _HEAD.search(name) is not None


def is_constant(name: str) -> bool:
    """Return True for a constant that is not a weight (causal mask, rotary frequencies, position numbers)."""
    return _CONSTANT.search(name) is not None


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
