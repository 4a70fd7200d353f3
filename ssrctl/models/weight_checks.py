"""Checks of freshly loaded weights: everything came from the file, is finite, and fits the tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import is_constant
from ssrctl.errors import UserError
from ssrctl.report.formats import times

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 3
_PIECE = 2**24  # elements that are looked at together, so that a check takes tens of megabytes


def check_all_loaded(name: str, model: Any, report: Mapping[str, Any]) -> str | None:
    """Refuse a model of which transformers drew some weights at random, or left some of the file's unused.

    Args:
        name: the model, for messages.
        model: as loaded.
        report: the loading info of ``from_pretrained``: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``.

    Returns:
        A sentence on tensors that belong to modules that the model lacks (a value head, a vision tower); None without.

    Raises:
        UserError: tensors that the file lacks, that have another shape there, or that the file has in addition in
            modules that the model does have.
    """
    total = len(model.state_dict())
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        first, stored, wanted = mismatched[0][:3]
        raise UserError(
            f"{name}: {times(len(mismatched), 'tensor')} of {total} have another shape in the file than by the config, "
            f"first {first}: {list(stored)} in the file, {list(wanted)} by the config",
            "the config.json belongs to other weights; copy the model again",
        )
    missing = sorted(report["missing_keys"])
    extra = sorted(key for key in report["unexpected_keys"] if not is_constant(key))
    if missing:
        found = f", which holds {listed(extra)} instead" if extra else ""
        raise UserError(
            f"{name} lacks {len(missing)} of the model's {total} tensors (first {listed(missing)}){found}",
            _remedy(missing, extra),
        )
    inside = [key for key in extra if _belongs(model, key)]
    if inside:
        raise UserError(
            f"{name} holds {times(len(inside), 'tensor')} that the model of its config.json has no place for "
            f"(first {listed(inside)})",
            "the config.json belongs to other weights; copy the model again",
        )
    if extra:
        return f"{times(len(extra), 'tensor')} of {name} are not part of a causal LM and not used: {listed(extra)}"
    return None


def listed(names: Collection[str]) -> str:
    """Return the first names, cut off with three dots."""
    return ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def common_prefix(missing: Collection[str], extra: Collection[str]) -> str | None:
    """Return the prefix that all ``extra`` names have in excess of the ``missing`` ones; None where that is not all."""
    wanted = max(missing, key=len)
    found = {name.removesuffix(wanted) for name in extra if name.endswith("." + wanted)}
    if len(found) != 1:
        return None
    prefix = found.pop()
    return prefix if all(prefix + name in extra for name in missing) else None


def _remedy(missing: Collection[str], extra: Collection[str]) -> str:
    if extra and (prefix := common_prefix(missing, extra)) is not None:
        return f"all its names begin with '{prefix}', which a wrapper left: save the model without it"
    if any(key.startswith(("score.", "classifier.", "reward_head.")) for key in extra):
        return "it is a classifier or reward model; name a causal language model"
    if extra:
        return "the file's names are not those of the model that its config.json describes"
    return "copy the model again: weights that are not in the file would be drawn at random"


def _belongs(model: Any, key: str) -> bool:
    """Return True for a tensor of a module that the model has, or of a layer beyond the model's last."""
    parent = key.rpartition(".")[0]
    try:
        return next(model.get_submodule(parent).parameters(recurse=False), None) is not None
    except AttributeError:
        parts = parent.split(".")
        for depth, part in enumerate(parts):
            if part.isdecimal():
                return any(name == ".".join(parts[:depth]) for name, _ in model.named_modules())
        return False


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite, or of a dtype that cannot be computed in.

    Raises:
        UserError: there are some; the first tensor and the counts are named.
    """
    import torch

    computed = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    bad: dict[str, int] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in computed:
            stored = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {key} is stored as {stored} without a quantization_config", "give a model in bfloat16"
            )
        count = sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.detach().reshape(-1).split(_PIECE))
        if count:
            bad[key] = count
    if bad:
        first = next(iter(bad))
        dtype = tensors[first].dtype
        raise UserError(
            f"{name}: NaN or infinite weights, {sum(bad.values()):,} in {times(len(bad), 'tensor')}, first "
            f"{bad[first]:,} of {tensors[first].numel():,} in {first}",
            "they may be beyond float16's range; use --dtype float32 or bfloat16"
            if dtype == torch.float16
            else "the checkpoint is damaged or its training diverged; use an earlier one",
        )


def check_tokens(name: str, model: Any, tokenizer: Any) -> str | None:
    """Check that the embedding has a row for the pad token.

    Returns:
        A sentence on tokens beyond the embedding; None without.

    Raises:
        UserError: the pad token has no row.
    """
    embedding = model.get_input_embeddings()
    if getattr(embedding, "weight", None) is None:
        return None
    rows = embedding.weight.shape[0]
    if not 0 <= tokenizer.pad_token_id < rows:
        raise UserError(
            f"{name}: the pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, the embedding has rows 0 "
            f"to {rows - 1}",
            "set pad_token in tokenizer_config.json to a token that the model knows, such as its end token",
        )
    beyond = len(tokenizer) - rows
    if beyond > 0:
        return f"the tokenizer of {name} has {times(beyond, 'token')} beyond the embedding's {rows} rows"
    return None


def head_is_untied(model: Any) -> bool:
    """Return True for a head that the config ties to the embedding and that has values of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    weights = (getattr(head, "weight", None), getattr(embedding, "weight", None))
    return bool(tied and weights[0] is not None and weights[1] is not None and weights[0] is not weights[1])
