"""Tensor names: the layer and the kind of matrix that a name stands for, and names in a file against parameter names.

Training knows a model by its ``named_parameters``: a tied tensor once, no buffers, with the model's prefix. A file may
lack the prefix (the hub's GPT-2 holds ``wte.weight`` where ``save_pretrained`` writes ``transformer.wte.weight``), hold
a copy of the embedding as output head, and constants such as causal masks, and hold in pieces what the model joins on
loading (experts). ``NameMap`` converts in both directions.
"""

from __future__ import annotations

import collections
import fnmatch
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ssrctl.errors import UserError

Shape = tuple[int, ...]

# What vLLM stacks by rows, in this order, in Llama, Mistral, Qwen and the like (its ``packed_modules_mapping``).
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

KINDS = ("embed", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm", "lm_head", "other")

# The first pattern that is found in the name decides, whatever its case; norms come first because of q_norm
# and k_norm.
_KIND_PATTERNS = (
    ("norm", r"norm|(^|[._])ln(_\w+|\d*)?\."),
    ("lm_head", r"(^|\.)(lm_head|embed_out|output_layer)\.|^(model\.)?output\.weight$"),
    ("embed", r"embed|(^|\.)(wte|wpe)\."),
    ("qkv", r"\.(qkv_proj|query_key_value|c_attn|wqkv|qkv)\."),
    ("gate_up", r"\.gate_up_proj(\.|$)"),
    ("q", r"\.(q_proj|wq|query|q_lin)\."),
    ("k", r"\.(k_proj|wk|key|k_lin)\."),
    ("v", r"\.(v_proj|wv|value|v_lin)\."),
    ("o", r"\.(o_proj|wo|out_proj|out_lin|attn\.c_proj|(self_)?(attention|attn)\.dense|attention\.output\.dense)\."),
    ("down", r"\.(down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|output\.dense)(\.|$)"),
    ("gate", r"\.(gate_proj|w1)(\.|$)"),
    ("up", r"\.(up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h)(\.|$)"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
# Constants that older files store next to the weights: causal masks, rotary frequencies, position numbers.
_CONSTANT = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")


def matrix_kind(name: str) -> str:
    """Return the part of a transformer that a tensor is, by its name: one of ``KINDS``. A bias counts with its matrix."""
    for kind, pattern in _KIND_PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def layer_index(name: str) -> int | None:
    """Return the layer number in a tensor's name, from 0; None outside of the layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Part:
    """A range of a file's tensor, or of a parameter, by flat indices.

    Attributes:
        name: of the tensor.
        start: its first element.
        count: elements.
    """

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class NameMap:
    """Two-way map between the tensors in a file and parameters; without entries they are the same.

    Example::

        names = NameMap.between(["wte.weight"], ["transformer.wte.weight"])
        names.to_parameter("wte.weight")  # "transformer.wte.weight"
        names.to_file("transformer.wte.weight")  # "wte.weight"

    Attributes:
        prefix: what the file's names lack; empty when they lack nothing.
        renamed: {name in the file: parameter name}, of the names that differ.
        joined: {parameter: the ranges of the file's tensors that it consists of}, of those that are not one whole tensor.
    """

    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)

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

    @classmethod
    def converted(cls, parts: Mapping[str, tuple[Part, ...]], sizes: Mapping[str, int]) -> NameMap:
        """Return the map for parameters that consist of ``parts`` of the file's tensors, which have ``sizes`` elements.

        A file's tensor of which no parameter or several parameters hold an element is left out with all that holds it.
        """
        covered, totals = collections.Counter[str](), collections.Counter[str]()
        for part in itertools.chain.from_iterable(parts.values()):
            covered[part.name] += 1
            totals[part.name] += part.count
        whole = {name: one for name, one in parts.items() if all(totals[part.name] == sizes[part.name] for part in one)}
        renamed, joined = {}, {}
        for name, one in whole.items():
            first = one[0]
            if len(one) == 1 and covered[first.name] == 1:
                if first.name != name:
                    renamed[first.name] = name
            else:
                joined[name] = one
        return cls("", renamed, joined)

    def parts_of(self, stored: str) -> list[Part]:
        """Return the ranges of parameters that a joined tensor of the file consists of, in order; else an empty list."""
        return self._held.get(stored, [])

    @functools.cached_property
    def _held(self) -> dict[str, list[Part]]:
        found: dict[str, list[tuple[int, Part]]] = {}
        for name, parts in self.joined.items():
            start = 0
            for part in parts:
                found.setdefault(part.name, []).append((part.start, Part(name, start, part.count)))
                start += part.count
        return {stored: [part for _, part in sorted(held, key=lambda one: one[0])] for stored, held in found.items()}

    @functools.cached_property
    def _stored(self) -> dict[str, str]:
        return {parameter: stored for stored, parameter in self.renamed.items()}

    def to_parameter(self, name: str) -> str:
        """Return the parameter name of a tensor in the file."""
        return self.renamed.get(name, name)

    def to_file(self, name: str) -> str:
        """Return the name in the file of a parameter."""
        return self._stored.get(name, name)


def replaced_prefix(stored: Mapping[str, Shape], parameters: Mapping[str, Shape]) -> tuple[str, str] | None:
    """Return the (prefix, its replacement) that gives most of a file's tensors a name and shape in ``parameters``.

    Wrappers and models with towers put a whole language model under another name: ``base_model.model.`` in front, or
    ``model.language_model.`` for ``model.``. None where fewer than half of the smaller side's tensors are met.
    """
    ends: dict[str, list[str]] = {}
    for name in parameters:
        ends.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    votes: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, shape in stored.items():
        for other in ends.get(".".join(name.split(".")[-2:]), []):
            if parameters[other] == shape:
                ours, theirs = name.split("."), other.split(".")
                while ours and theirs and ours[-1] == theirs[-1]:
                    ours.pop(), theirs.pop()
                votes["".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)] += 1
    best = max(votes, key=lambda pair: (votes[pair], -len(pair[0])), default=None)
    return best if best is not None and 2 * votes[best] > min(len(stored), len(parameters)) else None


def matching(names: Sequence[str], flag: str, patterns: Iterable[str], owner: str) -> set[str]:
    """Return the names that any of the glob patterns matches.

    Args:
        names: of the tensors.
        flag: where the patterns come from, for messages.
        patterns: as ``fnmatch`` reads them, with case.
        owner: whose names they are, for messages.

    Raises:
        UserError: a pattern that matches nothing.
    """
    hits: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"{flag} {pattern!r} matches none of the {len(names)} tensors of {owner}",
                f"names are like {names[0]}; * stands for anything" if names else None,
            )
        hits |= set(found)
    return hits


def is_head(name: str) -> bool:
    """Return True for the output head's matrix."""
    return _HEAD.search(name) is not None


def is_constant(name: str) -> bool:
    """Return True for a constant that is not a weight (causal mask, rotary frequencies, position numbers)."""
    return _CONSTANT.search(name) is not None
