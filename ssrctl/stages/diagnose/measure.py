"""What `ssrctl diagnose` measures on open checkpoints: each family's numbers, one tensor or a few at a time."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.stages.diagnose.deliver import say, stderr
from ssrctl.stages.diagnose.inputs import Inputs, Tuned, first_of
from ssrctl.stages.diagnose.work import changed_rule, each_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask
    from ssrctl.measures.maths.change import Change
    from ssrctl.measures.maths.largest_changes import TopMovers

# One core's time for rank, spectrum and landing of a matrix, over its size times its smaller side.
SECONDS_PER_UNIT = 1e-9
LONG_SECONDS = 900


def compare(inputs: Inputs, tuned: Tuned, config: DiagnoseConfig) -> tuple[dict[str, Change], TopMovers]:
    """Every weight of one checkpoint against the base, in one pass over both."""
    from rich.progress import Progress

    from ssrctl.measures.maths.largest_changes import TopMovers
    from ssrctl.measures.sparsity import compare_all

    movers = TopMovers()
    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"comparing {tuned.label}", total=len(inputs.names))
        changes = compare_all(
            inputs.base,
            tuned.reader,
            inputs.names,
            atol=config.atol,
            eta=config.eta,
            num_workers=config.num_workers,
            movers=movers,
            on_done=lambda name: bar.advance(task),
        )
    return changes, movers


def matrices(inputs: Inputs, tuned: Tuned, changes: Mapping[str, Change], config: DiagnoseConfig) -> dict[str, Any]:
    """Rank, spectrum and landing of every matrix; keys ``rank``, ``spectrum``, ``skipped`` and ``landing``."""
    from ssrctl.measures import landing
    from ssrctl.measures import matrices as matrix_measures
    from ssrctl.measures.maths.row_column_counts import Profile, profile
    from ssrctl.measures.maths.update_matrix import Unmeasured
    from ssrctl.measures.spectrum_report import spectrum_numbers

    wants_rank, wants_spectrum, wants_landing = (
        config.wants(measure, default=True) for measure in ("rank", "spectrum", "landing")
    )
    differs, rule = changed_rule(config.rule, config.atol, config.eta)
    shapes, dtypes = inputs.base.shapes, inputs.base.dtypes
    skipped = {
        name: reason for name in inputs.names if (reason := matrix_measures.skip_reason(shapes[name], dtypes[name]))
    }
    names = [name for name in inputs.names if name not in skipped]
    _warn_if_long([shapes[name] for name in names], config)
    pictured = _examples(inputs, changes)
    sets = {"rank_share": config.principal_rank, "density": config.mask_density}

    def measure(name: str) -> tuple[dict[str, Any], dict[str, Any], Profile | None, dict[str, Any] | None]:
        base, now = tuned.original(inputs.base, name), tuned.reader.tensor(name)
        spectra: dict[str, Any] = {}
        if wants_rank or wants_spectrum:
            spectra = matrix_measures.measure_tensor(
                name, base, now, k=config.k, seed=config.seed, rank=wants_rank, spectrum=wants_spectrum
            )
        if not wants_landing or landing.skip_reason(name, shapes[name], dtypes[name]) is not None:
            return spectra, {}, None, None
        if changes[name].num_equal == changes[name].numel:
            return spectra, {name: Unmeasured("nothing in it changed")}, None, None
        changed, base = differs(base, now), _widened(base)
        landed = landing.measure_tensor(name, base, changed, seed=config.seed, **sets)
        picture = landing.example(name, base, changed, seed=config.seed, **sets) if name in pictured else None
        return spectra, landed, profile(changed) if changed.dim() == 2 else None, picture

    spectra: dict[str, Any] = {}
    landed: dict[str, Any] = {}
    profiles: dict[str, Profile] = {}
    pictures: list[dict[str, Any]] = []
    for name, (more, where, lines, picture) in each_tensor(names, measure, config.num_workers, "measuring matrices"):
        spectra |= more
        landed |= where
        if lines is not None:
            profiles[name] = lines
        if picture is not None:
            pictures.append(picture)
    numbers: dict[str, Any] = spectrum_numbers(spectra, skipped)
    if wants_landing and landed:
        numbers["landing"] = landing.landing_numbers(landed, profiles, rule=rule, examples=pictures, **sets)
    return numbers


def _warn_if_long(shapes: list[tuple[int, ...]], config: DiagnoseConfig) -> None:
    """Say it before hours are spent on decompositions."""
    seconds = SECONDS_PER_UNIT * sum(math.prod(shape) * min(shape[-2:]) for shape in shapes) / config.num_workers
    if seconds > LONG_SECONDS:
        say(
            f"decomposing {len(shapes)} matrices takes about {seconds / 3600:.1f} hours; --layers 0,15,31 takes some of "
            "them, --measures sparsity,size none"
        )


def _widened(weights: Tensor) -> Tensor:
    """8-bit floating-point weights as bfloat16, which holds them exactly: torch hardly computes with the former."""
    import torch

    return weights.to(torch.bfloat16) if weights.dtype.is_floating_point and weights.itemsize == 1 else weights


def _examples(inputs: Inputs, changes: Mapping[str, Change]) -> list[str]:
    """A query or gate matrix of the middle layer, to be pictured; none where nothing changed."""
    from ssrctl.checkpoints.names import layer_index, matrix_kind

    changed = [
        name
        for name in inputs.names
        if changes[name].num_equal < changes[name].numel and len(inputs.base.shapes[name]) == 2
    ]
    layers = sorted({layer for name in changed if (layer := layer_index(name)) is not None})
    if not layers:
        return []
    middle = layers[len(layers) // 2]
    kinds = {matrix_kind(name): name for name in changed if layer_index(name) == middle}
    return [kinds[kind] for kind in ("q", "qkv", "gate", "up", "gate_up") if kind in kinds][:2]


def overlap(inputs: Inputs, config: DiagnoseConfig) -> dict[str, Any]:
    """How the changed sets of several checkpoints meet."""
    from ssrctl.core.mask import TileSet
    from ssrctl.measures.maths.magnitude import count_by_magnitude
    from ssrctl.measures.maths.row_column_counts import profile
    from ssrctl.measures.overlap import RunOverlap, consensus_example, run_overlap, run_overlap_numbers

    differs, rule = changed_rule(config.rule, config.atol, config.eta)

    pictured = _middle_matrix(inputs)

    def measure(name: str) -> tuple[RunOverlap, dict[str, Any] | None]:
        base = inputs.base.tensor(name)
        changed = [differs(tuned.original(inputs.base, name), tuned.reader.tensor(name)) for tuned in inputs.tuned]
        found = run_overlap(
            [TileSet.from_dense(one) for one in changed],
            [profile(one) if one.dim() == 2 else None for one in changed],
            count_by_magnitude(_widened(base), *changed) if base.dtype.is_floating_point else None,
        )
        return found, consensus_example(name, changed) if name == pictured else None

    found, pictures = {}, []
    for name, (one, picture) in each_tensor(inputs.names, measure, config.num_workers, "measuring overlap"):
        found[name] = one
        pictures += [] if picture is None else [picture]
    return run_overlap_numbers(found, [tuned.label for tuned in inputs.tuned], rule, pictures)


def _middle_matrix(inputs: Inputs) -> str | None:
    """The first matrix of the middle layer, to be pictured."""
    from ssrctl.checkpoints.names import layer_index

    layers = {name: layer_index(name) for name in inputs.names if len(inputs.base.shapes[name]) == 2}
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    return next((name for name, layer in layers.items() if numbers and layer == numbers[len(numbers) // 2]), None)


def over_time(inputs: Inputs, config: DiagnoseConfig) -> dict[str, Any]:
    """What a series of checkpoints changed, kept and took back."""
    from ssrctl.measures.over_time import OverTime, over_time_numbers
    from ssrctl.measures.over_time import over_time as follow

    differs, rule = changed_rule(config.rule, config.atol, config.eta)
    bits_differ, _ = changed_rule("bits", config.atol, config.eta)

    def measure(name: str) -> OverTime:
        reads = [functools.partial(tuned.reader.tensor, name) for tuned in inputs.tuned]
        return follow(inputs.tuned[-1].original(inputs.base, name), reads, differs, bits_differ)

    found = dict(each_tensor(inputs.names, measure, config.num_workers, "following the run"))
    steps = [tuned.step for tuned in inputs.tuned]
    numbered = [place if step is None else step for place, step in enumerate(steps, start=1)]
    if None in steps or numbered != sorted(set(numbered)):
        numbered = list(range(1, len(steps) + 1))
    return over_time_numbers(found, numbered, rule)


def protected_weights(inputs: Inputs, config: DiagnoseConfig) -> BlockMask | None:
    """The mask of ``--protect`` or ``--assert-frozen``, if any.

    Raises:
        UserError: both, a mask that cannot be read, or one of other tensors.
    """
    from ssrctl.io.artifacts import load_mask

    if config.protect is not None and config.assert_frozen is not None:
        raise UserError(
            "--protect and --assert-frozen each name a mask", "give --assert-frozen alone; it reports the same"
        )
    path = config.assert_frozen or config.protect
    if path is None:
        return None
    mask = load_mask(path)[0]
    shared = [name for name in mask.shapes if name in inputs.names]
    if not shared:
        raise UserError(f"{path} is a mask of other tensors: none of them is compared", "name the checkpoints' mask")
    for name in shared:
        if mask.shapes[name] != inputs.base.shapes[name]:
            raise UserError(
                f"{path} has {name} with shape {list(mask.shapes[name])}, the checkpoints have it with "
                f"{list(inputs.base.shapes[name])}",
                "give a mask that was made for this model",
            )
    return mask


def audit(inputs: Inputs, tuned: Tuned, mask: BlockMask | None, config: DiagnoseConfig) -> dict[str, Any]:
    """Whether protected weights moved, and which tensors did; ``mask`` is from ``protected_weights``."""
    from ssrctl.measures.audit import audit_numbers, audit_tensor, spike_audit

    path = config.assert_frozen or config.protect
    differs, _ = changed_rule("bits", config.atol, config.eta)
    spikes = [] if path is None else _spikes(path)
    found_spikes: list[dict[str, Any]] = []
    if unseen := sorted({spike["parameter"] for spike in spikes} - set(inputs.names)):
        say(f"{len(unseen)} tensors with activation outliers are not compared: {first_of(unseen)}")

    def measure(name: str) -> tuple[Any, list[dict[str, Any]]]:
        changed: Tensor = differs(tuned.original(inputs.base, name), tuned.reader.tensor(name))
        protected = mask.tensors.get(name) if mask is not None else None
        mine = [spike_audit(spike, protected, changed) for spike in spikes if spike["parameter"] == name]
        return audit_tensor(name, protected, changed), mine

    found = {}
    for name, (one, mine) in each_tensor(inputs.names, measure, config.num_workers, "auditing"):
        found[name] = one
        found_spikes += mine
    elsewhere = {} if mask is None else {name: one.count() for name, one in mask.tensors.items() if name not in found}
    return audit_numbers(found, found_spikes, {} if config.layers else elsewhere)


def _spikes(mask: Path) -> list[dict[str, Any]]:
    """The activation outliers that `ssrctl superweights` found, from the report beside its mask."""
    report = mask.with_name(mask.stem + ".report.json")
    if not report.is_file():
        return []
    try:
        spikes = json.loads(report.read_text(encoding="utf-8")).get("spikes") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{report} cannot be read: {error}", "remove it, or make the mask again") from error
    wanted = ("parameter", "out_channel", "in_channel")
    if not all(isinstance(spike, dict) and all(key in spike for key in wanted) for spike in spikes):
        raise UserError(f"{report}: its list of spikes is not one of ours", "make the mask again")
    return list(spikes)
