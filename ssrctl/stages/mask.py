"""`ssrctl mask`: static masks from a model's weights, from what training changed, and from other masks.

Checkpoints are read one tensor at a time, so that memory goes to the mask (at most a bit for each weight) and to one
tensor. Every mask covers all parameters of its model and carries the model's fingerprint,
which `train --mask` checks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import (
    MaskCompareConfig,
    MaskComplementConfig,
    MaskDiffConfig,
    MaskInfoConfig,
    MaskIntersectConfig,
    MaskLayersConfig,
    MaskLowMagnitudeConfig,
    MaskMinusConfig,
    MaskPrincipalConfig,
    MaskRandomConfig,
    MaskUnionConfig,
)
from ssrctl.configs.layers import layer_ranges
from ssrctl.configs.mask import MaskOutput, MaskSource
from ssrctl.errors import UserError
from ssrctl.io import console, manifest
from ssrctl.io.artifacts import ModelIdentity, mask_at
from ssrctl.masks.headers import MaskHeader, check_same_model, read_mask_header
from ssrctl.report.formats import times

if TYPE_CHECKING:
    from ssrctl.checkpoints.reader import TensorReader
    from ssrctl.core.mask import BlockMask
    from ssrctl.masks.changed_weights import Rule
    from ssrctl.masks.static_masks import Recipe
    from ssrctl.models.stored_parameters import StoredParameters


# --------------------------------------------------------------------------------------------------
# from weights


def run_random(config: MaskRandomConfig) -> dict[str, Any]:
    """Write a mask of a random share of each tensor; errors as in ``_from_weights``."""
    from ssrctl.masks.static_masks import like_recipe, random_recipe

    if config.like is None:
        return _from_weights(config, random_recipe(config.density, config.seed), "raise --density")
    like = read_mask_header(config.like)
    counts = {name: tiles.count() for name, tiles in like.load().tensors.items()}
    return _from_weights(config, like_recipe(counts, config.seed), "give another mask with --like", like=like)


def run_principal(config: MaskPrincipalConfig) -> dict[str, Any]:
    """Write a mask of the largest weights of each matrix's reconstruction; errors as in ``_from_weights``."""
    from ssrctl.masks.static_masks import principal_recipe

    recipe = principal_recipe(config.density, config.rank)
    return _from_weights(config, recipe, "raise --density, or choose tensors that are matrices")


def run_low_magnitude(config: MaskLowMagnitudeConfig) -> dict[str, Any]:
    """Write a mask of each tensor's smallest weights; errors as in ``_from_weights``."""
    from ssrctl.masks.static_masks import low_magnitude_recipe

    return _from_weights(config, low_magnitude_recipe(config.density), "raise --density")


def run_layers(config: MaskLayersConfig) -> dict[str, Any]:
    """Write a mask of all weights of some layers; errors as in ``_from_weights``, and a layer that is not there."""
    from ssrctl.masks.static_masks import layers_recipe

    layers = None if config.layers is None else layer_ranges(config.layers)
    return _from_weights(config, layers_recipe(layers), "choose other layers or patterns", layers or ())


def _from_weights(
    config: MaskSource,
    recipe: Recipe,
    when_empty: str,
    layers: Sequence[range] = (),
    like: MaskHeader | None = None,
) -> dict[str, Any]:
    """Make a mask from a model's weights, write it and show it; ``like`` is a mask whose tensors have to be the model's.

    Raises:
        UserError: no model, tensors that are not those of ``like``, a pattern or layer that is not in it, weights that are NaN or infinite where their order
            matters, or a mask of nothing or of everything.
    """
    from ssrctl.checkpoints.pairs import local_copy
    from ssrctl.checkpoints.reader import TensorReader
    from ssrctl.masks.static_masks import make_mask, planned_counts
    from ssrctl.models.stored_parameters import stored_parameters

    with TensorReader(local_copy(Path(config.model))) as reader:
        _check_output(config.output, reader.files)
        stored = stored_parameters(reader)
        _check_layers(stored, layers)
        if like is not None:
            check_same_model(like, MaskHeader(Path(config.model), recipe.kind, dict(stored.shapes), None, 0))
        counts = planned_counts(stored, recipe, config.include, config.exclude)
        sizes = {name: math.prod(shape) for name, shape in stored.shapes.items()}
        _check_proper(f"the {recipe.kind} mask", sum(counts.values()), sum(sizes.values()), when_empty)
        if config.dry_run:
            planned = {"tensors": len(sizes), "tensors_selected": sum(count > 0 for count in counts.values())}
            planned |= {"coordinates": sum(sizes.values()), "selected": sum(counts.values())}
            return console.show_file_plan(reader.files, config.output, planned)
        mask, fingerprint = make_mask(
            stored, recipe, counts, functools.partial(console.tracked, what="making the mask")
        )
        identity = reader.identity(fingerprint)
    notes = stored.notes + recipe.remarks({name: stored.shapes[name] for name, count in counts.items() if not count})
    if left_out := len(sizes) - len(counts):
        notes.append(f"{times(left_out, 'tensor')} left out by --include and --exclude.")
    return _deliver(config, recipe.kind, mask, identity, _settings(config), notes)


def _check_layers(stored: StoredParameters, layers: Iterable[range]) -> None:
    """Check that the model has the layers."""
    from ssrctl.checkpoints.names import layer_index

    there = {layer for name in stored.names if (layer := layer_index(name)) is not None}
    highest = max((one[-1] for one in layers), default=-1)
    if highest > max(there, default=-1):
        raise UserError(
            f"there is no layer {highest}: {stored.reader.label} has "
            + (f"layers {min(there)} to {max(there)}" if there else "no layers that its tensors' names tell"),
            "name layers that it has" if there else "choose tensors with --include instead of --layers",
        )


# --------------------------------------------------------------------------------------------------
# from what training changed


def run_diff(config: MaskDiffConfig) -> dict[str, Any]:
    """Write a mask of the weights that differ between two checkpoints, or that a delta changes.

    Raises:
        UserError: checkpoints of different models, a delta of another base, or no change at all.
    """
    from ssrctl.checkpoints.pairs import local_copy
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by
    from ssrctl.measures.maths.change_rule import changed

    before, after = local_copy(config.base), local_copy(config.tuned)
    if delta_meant_by(before) is not None:
        raise UserError(f"BASE {config.base} is a delta, not whole weights", "give the model that training began from")
    rule = functools.partial(changed, rule=config.changed_by, atol=config.atol, eta=config.bf16_rtol)
    delta = delta_meant_by(after)
    with TensorReader(before) as base:
        if delta is not None:
            return _diff_delta(config, base, delta, rule)
        with TensorReader(after) as tuned:
            return _diff_pair(config, base, tuned, rule)


def _diff_pair(config: MaskDiffConfig, base: TensorReader, tuned: TensorReader, rule: Rule) -> dict[str, Any]:
    from ssrctl.checkpoints.pairs import chosen_names
    from ssrctl.masks.changed_weights import changed_in_pair, check_pair
    from ssrctl.models.stored_parameters import stored_parameters

    _check_output(config.output, [*base.files, *tuned.files])
    stored = stored_parameters(base)
    names, notes = check_pair(stored, tuned, strict=config.strict)
    names, said = chosen_names(names, config, base.label)
    notes += said
    if config.dry_run:
        coordinates = sum(map(math.prod, stored.shapes.values()))
        planned = {"tensors": len(stored.names), "coordinates": coordinates}
        return console.show_file_plan([*base.files, *tuned.files], config.output, planned)
    mask, before, after = changed_in_pair(
        stored, tuned, names, rule, functools.partial(console.tracked, what="comparing")
    )
    settings = _settings(config) | {"tuned_model": dataclasses.asdict(tuned.identity(after))}
    return _deliver(
        config, "diff", mask, base.identity(before), settings, stored.notes + notes + _dtype_notes(stored, tuned, names)
    )


def _diff_delta(config: MaskDiffConfig, base: TensorReader, path: Path, rule: Rule) -> dict[str, Any]:
    from ssrctl.checkpoints.delta import DeltaFile
    from ssrctl.checkpoints.reader import check_shapes
    from ssrctl.masks.changed_weights import changed_by_delta

    _check_output(config.output, [*base.files, path])
    delta = DeltaFile(path)
    check_shapes(path, delta.base, delta.shapes, base)
    if config.dry_run:
        coordinates = sum(map(math.prod, delta.shapes.values()))
        planned = {"tensors": len(delta.shapes), "coordinates": coordinates, "selected_at_most": delta.count}
        return console.show_file_plan([*base.files, path], config.output, planned)
    mask = changed_by_delta(base, delta, path, rule, functools.partial(console.tracked, what="comparing"))
    settings = _settings(config) | {"delta": {"name": path.name, "hash": manifest.file_hash(path)}}
    return _deliver(config, "diff", mask, delta.base, settings, [])


def _dtype_notes(base: StoredParameters, tuned: TensorReader, names: Iterable[str]) -> list[str]:
    odd = [name for name in names if base.dtype_of(name) != tuned.dtypes[name]]
    if not odd:
        return []
    before, after = (str(one).removeprefix("torch.") for one in (base.dtype_of(odd[0]), tuned.dtypes[odd[0]]))
    return [
        f"{times(len(odd), 'tensor')} of other dtypes in BASE and TUNED (the first {before} and {after}): changes by "
        "rounding count too."
    ]


# --------------------------------------------------------------------------------------------------
# from other masks


def run_union(config: MaskUnionConfig) -> dict[str, Any]:
    """Write the union of several masks; errors as in ``_combined``."""
    return _combined(config, "union", config.masks, functools.partial(functools.reduce, operator.or_))


def run_intersect(config: MaskIntersectConfig) -> dict[str, Any]:
    """Write the intersection of several masks; errors as in ``_combined``."""
    return _combined(config, "intersect", config.masks, functools.partial(functools.reduce, operator.and_))


def run_minus(config: MaskMinusConfig) -> dict[str, Any]:
    """Write the first of several masks without the others; errors as in ``_combined``."""
    return _combined(config, "minus", config.masks, functools.partial(functools.reduce, operator.sub))


def run_complement(config: MaskComplementConfig) -> dict[str, Any]:
    """Write the complement of a mask; errors as in ``_combined``."""

    def combine(masks: Iterator[BlockMask]) -> BlockMask:
        from ssrctl.core.mask import BlockMask, TileSet

        mask = next(masks)
        if not config.within:
            return ~mask
        tensors = mask.tensors.items()
        return BlockMask({name: t.complement() if t.count() else TileSet.empty(t.shape) for name, t in tensors})

    return _combined(config, "complement", [config.mask], combine)


def _combined(
    config: MaskOutput, kind: str, paths: Sequence[Path], combine: Callable[[Iterator[BlockMask]], BlockMask]
) -> dict[str, Any]:
    """Combine masks, which ``combine`` gets one after the other, and write the result.

    Raises:
        UserError: no masks, masks of different models, or a result of nothing or of everything.
    """
    headers = [read_mask_header(path) for path in paths]
    _check_output(config.output, paths)
    known = next((one for one in headers if one.model is not None), headers[0])
    for one in headers:
        check_same_model(known, one)
    if config.dry_run:
        planned = {"coordinates": known.numel, "selected_in": {str(one.path): one.count for one in headers}}
        return console.show_file_plan(paths, config.output, planned)
    mask = combine(one.load() for one in headers)
    settings = {key: value for key, value in _settings(config).items() if key not in ("mask", "masks")}
    settings["inputs"] = [
        {
            "name": one.path.name,
            "hash": manifest.file_hash(mask_at(one.path)),
            "mask_kind": one.kind,
            "count": one.count,
        }
        for one in headers
    ]
    unknown = [one.path.name for one in headers if one.model is None]
    notes = (
        [f"{', '.join(unknown)}: made for unknown weights, so that only the shapes were checked."] if unknown else []
    )
    given = ", ".join(f"{one.path} ({one.count:,})" for one in headers)
    what = f"the result of `mask {kind}` on {given}"
    return _deliver(config, kind, mask, known.model, settings, notes, what)


# --------------------------------------------------------------------------------------------------
# comparison


def run_compare(config: MaskCompareConfig) -> dict[str, Any]:
    """Compare each pair of masks and show it.

    Raises:
        UserError: masks of different models.
    """
    from ssrctl.masks.comparison import compare_masks, comparison_document
    from ssrctl.report.terminal import show_document

    headers = [read_mask_header(path) for path in config.masks]
    for one in headers[1:]:
        check_same_model(headers[0], one)
    masks = [one.load() for one in headers]
    pairs = [
        {"a": str(one.path), "b": str(other.path)} | compare_masks(mine, theirs)
        for (one, mine), (other, theirs) in itertools.combinations(zip(headers, masks, strict=True), 2)
    ]
    report = {"coordinates": headers[0].numel, "pairs": pairs}
    if not config.json:
        show_document(comparison_document(report), "the output of --json")
    return report


# --------------------------------------------------------------------------------------------------
# info


def run_info(config: MaskInfoConfig) -> dict[str, Any]:
    """Check a mask and show what it holds.

    Raises:
        UserError: no mask, or a damaged one.
    """
    from ssrctl.io.artifacts import count_mask, identity_field, json_field

    shapes, counts, metadata = count_mask(config.mask)
    model = identity_field(metadata, "model", config.mask)
    settings = json_field(metadata, "settings", config.mask)
    report = _report(config.mask, metadata.get("mask_kind", "unknown"), shapes, counts, model, settings, [])
    report["ssrctl_version"] = metadata.get("ssrctl_version")
    if not config.json:
        _show(report)
    return report


# --------------------------------------------------------------------------------------------------
# what they share


def _check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Check before the work that the output can be written and is not an input."""
    if output.resolve() in {one.resolve() for one in inputs}:
        raise UserError(f"{output} is one of the inputs", "name another file with -o")
    if output.is_dir():
        raise UserError(f"cannot write {output}: it is a folder", "name a file")
    parent = next(one for one in output.absolute().parents if one.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"cannot write {output}: no file can be made in {parent}", "choose a folder you can write to")


def _check_proper(what: str, count: int, numel: int, when_empty: str) -> None:
    """Check that a mask selects some weights and leaves some."""
    if count == 0:
        raise UserError(f"{what} is empty: it selects 0 of {numel:,} weights", when_empty)
    if count == numel:
        raise UserError(f"{what} is all {numel:,} weights", "choose fewer, or train without a mask")


def _settings(config: MaskOutput) -> dict[str, Any]:
    return manifest.published_settings(config) | {"versions": manifest.versions()}


def _deliver(
    config: MaskOutput,
    kind: str,
    mask: BlockMask,
    model: ModelIdentity | None,
    settings: Mapping[str, Any],
    notes: list[str],
    what: str = "",
) -> dict[str, Any]:
    """Write a mask and show what it holds."""
    from ssrctl.io.artifacts import save_mask

    when_empty = "choose other masks" if what else "name checkpoints that differ, or another --changed-by"
    _check_proper(what or f"the {kind} mask", mask.count(), mask.numel, when_empty)
    small = config.format == "small"
    save_mask(config.output, mask, mask_kind=kind, model=model, settings=settings, small=small)
    counts = {name: tiles.count() for name, tiles in mask.tensors.items()}
    report = _report(config.output, kind, mask.shapes, counts, model, settings, notes)
    if not config.json:
        _show(report)
        console.note(f"wrote {config.output}")
    return report


def _report(
    path: Path,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    model: ModelIdentity | None,
    settings: Any,
    notes: list[str],
) -> dict[str, Any]:
    """Describe a mask that was written or read; the settings of a file are any json."""
    from ssrctl.masks.table import mask_numbers

    return {
        "mask": str(path),
        "mask_kind": kind,
        "model": None if model is None else dataclasses.asdict(model),
        "settings": settings,
        "notes": notes,
        "bytes": mask_at(path).stat().st_size,
    } | mask_numbers(shapes, counts)


def _show(report: Mapping[str, Any]) -> None:
    from ssrctl.masks.table import mask_document
    from ssrctl.report.terminal import show_document

    show_document(mask_document(report), "the output of --json")
