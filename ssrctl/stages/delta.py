"""`ssrctl delta`: sparse checkpoints made from two dense ones, put back into a dense one, and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import DeltaFile, dtype_name
from ssrctl.checkpoints.files import INDEX, SINGLE
from ssrctl.checkpoints.run_dir import find_delta
from ssrctl.configs import DeltaApplyConfig, DeltaDiffConfig, DeltaInfoConfig
from ssrctl.errors import UserError
from ssrctl.io import console, manifest
from ssrctl.io.tensor_writing import dtype_bytes
from ssrctl.measures.maths.grouping import by_layer
from ssrctl.report.document import Column, Document, Section, Table
from ssrctl.report.formats import count, percent, times
from ssrctl.report.terminal import show_document
from ssrctl.version import __version__

if TYPE_CHECKING:
    import torch

    from ssrctl.checkpoints.delta_apply import AppliedCheckpoint

TOP_TENSORS = 10
MOST_LAYERS = 200


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor of a delta; ``dtype`` is torch's name, None where the delta does not say."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    changed: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


# --------------------------------------------------------------------------------------------------
# diff


def run_diff(config: DeltaDiffConfig) -> dict[str, Any]:
    """Write the difference of two checkpoints as a delta, and show how large it is.

    Raises:
        UserError: checkpoints of different architectures, or dtypes that cannot be compared exactly.
    """
    from ssrctl.checkpoints.delta_diff import write_difference
    from ssrctl.checkpoints.pairs import chosen_names, local_copy
    from ssrctl.checkpoints.parameter_names import matching_names, same_constants
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by

    ours, theirs = local_copy(config.base), local_copy(config.tuned)
    for side, given, place in (("BASE", config.base, ours), ("TUNED", config.tuned, theirs)):
        if delta_meant_by(place) is not None:
            raise UserError(f"{side} {given} is a delta, not whole weights", f"see `ssrctl delta info {given}`")
    with _one_thread(), TensorReader(ours) as base, TensorReader(theirs) as tuned:
        if config.output.resolve() in {file.resolve() for file in (*base.files, *tuned.files)}:
            raise UserError(f"{config.output} is one of the weights to compare", "name another file with -o")
        names, notes = matching_names(base, tuned, strict=config.strict)
        names, said = chosen_names(names, config, base.label)
        notes += said
        if constants := same_constants(base, tuned, names):
            notes.append(f"{times(len(constants), 'constant')}, the same in both, left out: not parameters.")
        names = base.in_file_order([name for name in names if name not in constants])
        if config.dry_run:
            return console.show_file_plan([*base.files, *tuned.files], config.output, {"tensors": len(names)})
        notes += _dtype_notes({name: (base.dtypes[name], tuned.dtypes[name]) for name in names})
        made = write_difference(
            config.output,
            base,
            tuned,
            console.tracked(names, "comparing"),
            settings=_settings(config),
            small=config.format == "small",
        )
    rows = [TensorRow(one.name, one.shape, dtype_name(one.dtype), one.changed) for one in made.tensors]
    report: dict[str, Any] = {
        "delta": str(config.output),
        "base": dataclasses.asdict(made.base),
        "tuned": dataclasses.asdict(made.tuned),
        "notes": notes,
    } | _measures(rows, config.output.stat().st_size)
    if not config.json:
        facts = [("base", made.base.name), ("tuned", made.tuned.name)]
        _show("Difference of two checkpoints", facts, report, [_largest(rows)])
        console.note(f"wrote {config.output}")
    return report


def _dtype_notes(pairs: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> list[str]:
    found = Counter((before, after) for before, after in pairs.values() if before != after)
    return [
        f"{times(number, 'tensor')} stored as {dtype_name(before)} in BASE converted to {dtype_name(after)}."
        for (before, after), number in sorted(found.items(), key=str)
    ]


# --------------------------------------------------------------------------------------------------
# apply


def run_apply(config: DeltaApplyConfig) -> dict[str, Any]:
    """Write a base with a delta put in as a model folder.

    Raises:
        UserError: a delta of another base, a damaged one, or an output that exists.
    """
    from ssrctl.checkpoints.delta_apply import AppliedCheckpoint
    from ssrctl.checkpoints.model_folder import check_free
    from ssrctl.checkpoints.pairs import local_copy
    from ssrctl.checkpoints.reader import TensorReader, check_shapes, check_weights, delta_meant_by

    place = local_copy(config.base)
    if delta_meant_by(place) is not None:
        raise UserError(f"BASE {config.base} is a delta, not whole weights", "give the model that it was made from")
    delta = DeltaFile(_delta_file(config.delta))
    if delta.small and config.ignore_fingerprint:
        raise UserError(
            f"{delta.path} holds steps from the values of {delta.base.name}, which other weights do not have",
            "apply it to its base, and take the difference from the other one: `ssrctl delta diff --format plain`",
        )
    check_free(config.output)
    with _one_thread(), TensorReader(place) as base:
        check_shapes(delta.path, delta.base, delta.shapes, base)
        load_dtype = None
        if not (config.ignore_fingerprint or config.dry_run):
            or_else = "" if delta.small else ", or give --ignore-fingerprint"
            load_dtype = check_weights(delta.path, delta.base, delta.shapes, base, or_else)
        made = AppliedCheckpoint(base, delta, load_dtype)
        if config.dry_run:
            return console.show_file_plan([delta.path, *base.files], config.output, {"write_bytes": made.nbytes})
        notes = _dtype_notes({name: (base.dtypes[name], dtype) for name, dtype in made.dtypes.items()})
        notes += [f"{head} is stored as a copy of {one} (tied) and follows it." for head, one in made.copies.items()]
        if config.ignore_fingerprint:
            notes.append(f"It was not checked that {base.label} is the base that the delta was made from.")
        return _write_folder(config, made, notes)


def _write_folder(config: DeltaApplyConfig, made: AppliedCheckpoint, notes: list[str]) -> dict[str, Any]:
    from ssrctl.checkpoints.delta_apply import write_applied
    from ssrctl.checkpoints.model_folder import CONFIG, copy_companions, set_config_dtype, whole_folder
    from ssrctl.checkpoints.run_dir import CHAT_TEMPLATE, chat_template_of

    base, delta = made.base, made.delta
    metadata = {
        "format": "pt",  # what transformers asks for
        "ssrctl_version": __version__,
        "base": json.dumps(dataclasses.asdict(delta.base)),
        "settings": json.dumps(_settings(config)),
    }
    with whole_folder(config.output) as folder:
        if (free := shutil.disk_usage(folder).free) < made.nbytes:
            raise UserError(
                f"{config.output} would take {_bytes(made.nbytes)}, {_bytes(free)} are free", "name a folder elsewhere"
            )
        if (base.folder / CONFIG).is_file():
            copied = copy_companions(base.folder, folder)
            if (template := chat_template_of(delta.path)) is not None:
                shutil.copyfile(template, folder / CHAT_TEMPLATE)
                copied = sorted({*copied, CHAT_TEMPLATE})
                notes.append(f"The chat template is that of the run, {template}.")
            if made.uniform_dtype is not None and set_config_dtype(folder, made.uniform_dtype):
                notes.append(f"{CONFIG} now asks for {dtype_name(made.uniform_dtype)}, as the weights are stored.")
        else:
            copied = []
            notes.append(f"There is no {CONFIG} next to {base.label}: the folder holds only the weights.")
        with console.progress(unit="tensors") as bar:
            stored = sum(len(base.stored_in(file)) for file in base.files)
            task = bar.add_task("writing", total=stored, status="")
            fingerprint = write_applied(made, folder, metadata, lambda name: bar.update(task, advance=1))
        if delta.tuned is not None and not config.ignore_fingerprint and fingerprint != delta.tuned.fingerprint:
            raise UserError(
                f"{delta.path} gives {fingerprint}, it was made from {delta.tuned.name} {delta.tuned.fingerprint}",
                "the delta's values are damaged; make or copy it again",
            )
    report: dict[str, Any] = {
        "output": str(config.output),
        "delta": str(delta.path),
        "base": dataclasses.asdict(delta.base),
        "fingerprint": fingerprint,
        "entries": delta.count,
        "coordinates": sum(math.prod(shape) for shape in delta.shapes.values()),
        "bytes": made.nbytes,
        "dtypes": _dtype_counts(map(dtype_name, made.dtypes.values())),
        "weights": sorted(one.relative_to(config.output).as_posix() for one in config.output.rglob("*.safetensors")),
        "copied": copied,
        "notes": notes,
    }
    if not config.json:
        facts = [("base", base.label), ("delta", str(delta.path))]
        kinds = ", ".join(report["dtypes"])
        headlines = [f"{times(delta.count, 'value')} put in; {_bytes(made.nbytes)} of weights in {kinds}."]
        if delta.tuned is not None and not config.ignore_fingerprint:
            headlines.append(f"The weights are bit for bit those of {delta.tuned.name}.")
        show_document(
            Document(title="Delta applied", facts=facts, headlines=headlines, notes=notes, sections=[]),
            "the output of --json",
        )
        console.note(f"wrote {config.output}")
    return report


# --------------------------------------------------------------------------------------------------
# info


def run_info(config: DeltaInfoConfig) -> dict[str, Any]:
    """Check a delta and show what it holds.

    Raises:
        UserError: no delta, or a damaged one.
    """
    delta = DeltaFile(_delta_file(config.delta))
    for name in console.tracked(list(delta.counts), "checking"):
        delta.check(name)
    rows = [
        TensorRow(name, shape, delta.dtype_name(name), delta.counts.get(name, 0))
        for name, shape in delta.shapes.items()
    ]
    report: dict[str, Any] = {
        "delta": str(delta.path),
        "ssrctl_version": delta.version,
        "base": dataclasses.asdict(delta.base),
        "tuned": None if delta.tuned is None else dataclasses.asdict(delta.tuned),
        "settings": delta.settings,
        "notes": [],
    } | _measures(rows, delta.path.stat().st_size)
    if not config.json:
        base = delta.base.name + ("" if delta.base.revision is None else f" ({delta.base.revision})")
        facts = [("delta", str(delta.path)), ("base", base), ("fingerprint", delta.base.fingerprint)]
        if delta.tuned is not None:
            facts.append(("tuned", delta.tuned.name))
        facts += [("dtypes", ", ".join(report["dtypes"]) or "not recorded"), ("written by", f"ssrctl {delta.version}")]
        _show("Delta", facts, report, [_layer_table(report["layers"]), _largest(rows)])
    return report


# --------------------------------------------------------------------------------------------------
# what they share


def _delta_file(path: Path) -> Path:
    """Return the delta that ``path`` means; a whole model is an error of its own."""
    if (path / SINGLE).exists() or (path / INDEX).exists():
        raise UserError(f"{path} is a whole model, not a delta", "make a delta with `ssrctl delta diff BASE TUNED`")
    return find_delta(path)


def _settings(config: Any) -> dict[str, Any]:
    return manifest.published_settings(config) | {"versions": manifest.versions()}


def _measures(rows: Sequence[TensorRow], size: int) -> dict[str, Any]:
    """Count the changes by tensor and layer, with shares and sizes."""
    coordinates, changed = sum(row.numel for row in rows), sum(row.changed for row in rows)
    known = [row.numel * dtype_bytes(row.dtype) for row in rows if row.dtype is not None]
    dense = sum(known) if len(known) == len(rows) else None
    return {
        "coordinates": coordinates,
        "changed": changed,
        "changed_frac": _share(changed, coordinates),
        "num_tensors": len(rows),
        "num_tensors_changed": sum(row.changed > 0 for row in rows),
        "dtypes": _dtype_counts(row.dtype for row in rows if row.dtype is not None),
        "bytes": size,
        "dense_bytes": dense,
        "bytes_frac": None if dense is None else _share(size, dense),
        "layers": [
            {"layer": "other" if layer is None else str(layer)}
            | _counted(sum(row.numel for row in of_it), sum(row.changed for row in of_it))
            for layer, of_it in by_layer({row.name: row for row in rows}).items()
        ],
        "tensors": [
            {"name": row.name, "shape": list(row.shape), "dtype": row.dtype} | _counted(row.numel, row.changed)
            for row in sorted(rows, key=lambda row: row.name)
        ],
    }


def _counted(coordinates: int, changed: int) -> dict[str, Any]:
    return {"coordinates": coordinates, "changed": changed, "changed_frac": _share(changed, coordinates)}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _dtype_counts(names: Iterable[str]) -> dict[str, int]:
    """Count tensors by the name of their dtype."""
    return dict(sorted(Counter(names).items()))


def _show(title: str, facts: list[tuple[str, str]], report: Mapping[str, Any], tables: list[Table]) -> None:
    changed, of, size, dense = (report[key] for key in ("changed", "coordinates", "bytes", "dense_bytes"))
    headlines = [
        f"{changed:,} of {of:,} coordinates changed ({percent(report['changed_frac'])}), in "
        f"{report['num_tensors_changed']} of {times(report['num_tensors'], 'tensor')}.",
        f"The delta takes {_bytes(size)}"
        + (f"; the dense weights take {_bytes(dense)} ({percent(size / dense)})." if dense else "."),
    ]
    if dense and size > dense:
        headlines.append("It is larger than the dense weights: keep those instead.")
    sections = [Section(title="", tables=tables)] if changed else []
    show_document(
        Document(title=title, facts=facts, headlines=headlines, notes=report["notes"], sections=sections),
        "the output of --json",
    )


def _largest(rows: Sequence[TensorRow]) -> Table:
    changed = sorted((row for row in rows if row.changed), key=lambda row: (-row.changed, row.name))
    return Table(
        title="Tensors with the most changes",
        columns=["tensor", Column("changed", count), Column("share", percent)],
        rows=[[row.name, row.changed, row.changed / row.numel] for row in changed[:TOP_TENSORS]],
    )


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title="By layer",
        columns=["layer", Column("changed", count), Column("share", percent)],
        rows=[[one["layer"], one["changed"], one["changed_frac"]] for one in layers],
        terminal_rows=MOST_LAYERS,
    )


def _bytes(number: int) -> str:
    from rich.filesize import decimal

    return decimal(number)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: the work is bound by memory, and waking a second one costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
