"""`ssrctl diagnose BASE TUNED...` and `ssrctl diagnose RUN`: open, walk once, combine, present, write."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.pair_words import split_pairs
from ssrctl.checkpoints.pairs import Checkpoint, Comparison, checkpoints_of, is_run, local_copy, open_pairs
from ssrctl.checkpoints.reader import TensorReader, delta_meant_by
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import CheckFailed, UserError
from ssrctl.measures.base import Findings, Measure, Mode, PairMeasure, Taken, registered, take
from ssrctl.measures.matrix_measure import MatrixMeasure
from ssrctl.measures.published import published_section, unusual
from ssrctl.measures.sparsity import Sparsity
from ssrctl.models.precision import resolve_device
from ssrctl.report.document import Document, Section
from ssrctl.report.formats import text_safe
from ssrctl.report.write import show_plan, write_report
from ssrctl.version import __version__

_DEFAULT_FOLDER = Path("diagnose")
_KINDS: dict[Mode, str] = {
    "pair": "checkpoint-difference",
    "several": "several-checkpoints",
    "series": "run-over-time",
    "run": "run-over-time",
}


def diagnose_checkpoints(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure checkpoints against their base and write the report.

    Raises:
        UserError: inputs that cannot be opened or do not fit each other, or nothing to measure.
        CheckFailed: the report is written, and ``--assert-frozen`` or ``--assert-moved`` does not hold.
    """
    pairs, run = _pairs(config)
    output = config.output_dir or run or _DEFAULT_FOLDER
    mode: Mode = "pair" if len(pairs) == 1 else "series" if config.series else "several"
    if run is not None:
        mode = "run"
    # Reports on a run lie next to one another in its folder.
    name = "diagnose" if run is None else "diagnose-run"
    chosen = _chosen(config, mode)
    if output.exists() and not output.is_dir():  # said now, not when everything is measured
        raise UserError(f"{output} is a file", "name a folder for the report")
    with contextlib.ExitStack() as stack:
        comparison = open_pairs(stack, pairs, config.layers, config)
        _check_picture(config, comparison, chosen)
        config = _with_device(config, chosen)
        measures = [measure(comparison, config, run) for measure in chosen]
        if of_matrices := [measure for measure in measures if isinstance(measure, MatrixMeasure)]:
            of_matrices[0].note_duration()
        if config.dry_run:
            return show_plan(_files(comparison, [tuned for _, tuned in pairs]), output, name, show=not config.json)
        taken = take(comparison, measures, mode, config.num_workers)
        report = _arranged(taken, comparison, mode)
        labels = [tuned.label for tuned in comparison.tuned]
        numbers = {
            "kind": _KINDS[mode],
            "ssrctl_version": __version__,
            "base": _bases(comparison)[0] if comparison.one_base else _bases(comparison),
            "tuned": labels[0] if len(labels) == 1 else labels,
            "atol": config.atol,
            "eta": config.bf16_rtol,
            "rule": config.changed_by,
            "identical": _identical(taken, comparison),
            "failed": report.failed,
            "headlines": report.headlines,
            "notes": report.notes,
            **report.numbers,
        }
        document = _document(report, comparison, config)
    written = write_report(numbers, document, output, name, show=not config.json)
    if report.failed:
        raise CheckFailed(" ".join(report.failed), result=written)
    return written


def _identical(taken: list[Taken[Any]], comparison: Comparison) -> bool:
    """Return True if no compared weight differs bit for bit from the base, and no side has weights that the other lacks."""
    counted = [one.result.changes.total for one in taken if isinstance(one.measure, Sparsity)]
    return not (comparison.one_sided or any(total.num_bit_changed for total in counted))


def _pairs(config: DiagnoseConfig) -> tuple[list[tuple[Path, Path]], Path | None]:
    """Return ((base, checkpoint) of each, the run that all of them belong to)."""
    if config.pairs:
        return split_pairs(list(map(str, config.paths))), None
    if len(config.paths) > 1:
        base, *checkpoints = config.paths
        return [(base, one) for one in checkpoints], None
    (run,) = config.paths
    if not is_run(run):
        raise UserError(
            f"{run} is not a run directory with checkpoints, and there is nothing to compare it with",
            "name a run of ssrctl train, or a base and a tuned checkpoint: ssrctl diagnose BASE TUNED",
        )
    base, checkpoints = checkpoints_of(run)
    return [(base, one) for one in checkpoints], run


def _chosen(config: DiagnoseConfig, mode: Mode) -> list[type[Measure[Any, Any]]]:
    """Return the measures to take.

    Raises:
        UserError: an unknown name in ``--measures``, or a measure that these paths cannot give.
    """
    measures = registered()
    names = [name for one in measures.values() if not one.audits for name in (one.name, *one.also)]
    asked = [] if config.measures is None else config.measures.replace(" ", "").split(",")
    for name in asked:
        if name not in [*names, "default"]:
            raise UserError(f"--measures: there is no measure {name!r}", f"choose of {', '.join([*names, 'default'])}")
        if name in measures and mode not in measures[name].possible_in:
            raise UserError(f"--measures {name} cannot be taken of these paths", f"it needs {measures[name].needs}")
    if config.prompts is not None and not {"function", "prune"} & set(asked):
        raise UserError("--prompts has no effect without function or prune", "add one of them to --measures")
    return [measure for measure in measures.values() if measure.wanted(config, mode)]


def _check_picture(config: DiagnoseConfig, comparison: Comparison, chosen: list[type[Measure[Any, Any]]]) -> None:
    """Refuse a matrix that nothing would picture.

    Raises:
        UserError: no measure that pictures one is taken, or the tensor is not a compared matrix.
    """
    if config.picture is None:
        return
    if not {"landing", "overlap", "time"} & {measure.name for measure in chosen}:
        raise UserError("--picture has no effect without landing, overlap or time", "add one of them to --measures")
    shapes = comparison.base.shapes
    matrices = [name for name in comparison.names if len(shapes[name]) == 2]
    if config.picture not in matrices:
        near = difflib.get_close_matches(config.picture, matrices, n=1, cutoff=0.0)
        raise UserError(
            f"--picture: {config.picture} is not a matrix that is compared",
            f"name one of {len(matrices)}, such as {near[0]}" if near else "compare checkpoints with matrices",
        )


def _with_device(config: DiagnoseConfig, chosen: list[type[Measure[Any, Any]]]) -> DiagnoseConfig:
    """Return the settings with the device by its own name.

    Raises:
        UserError: it is not there, has no float64, or has nothing to compute.
    """
    if config.device == "cpu":
        return config
    if not {"rank", "spectrum", "landing"} & {measure.name for measure in chosen}:
        raise UserError("--device has no effect without rank, spectrum or landing", "add one of them to --measures")
    if config.device.startswith("mps"):
        raise UserError(
            "--device mps: it has no float64, in which ranks and angles are computed", "leave out --device for the CPU"
        )
    return dataclasses.replace(config, device=str(resolve_device(config.device)))


def _files(comparison: Comparison, paths: list[Path]) -> list[Path]:
    bases = [comparison.base, *map(comparison.base_of, comparison.tuned)]
    files = list(dict.fromkeys(file for base in bases for file in base.files))
    for path, tuned in zip(paths, comparison.tuned, strict=True):
        delta = delta_meant_by(local_copy(path))
        if delta is not None:
            files.append(delta)
        elif isinstance(tuned.reader, TensorReader):
            files += tuned.reader.files
    return files


# --------------------------------------------------------------------------------------------------
# the report


def _arranged(taken: list[Taken[Any]], comparison: Comparison, mode: Mode) -> Findings:
    """Return the findings of all measures as one report.

    Of several checkpoints, those of each one are collapsed details below what compares them, and json has them under
    ``checkpoints``; a series has those of its last checkpoint under ``last``. Audits come last and count everywhere.
    """
    labels = [checkpoint.label for checkpoint in comparison.tuned]
    report = Findings(notes=list(comparison.notes))
    pairs = [one for one in taken if one.place is not None and not one.measure.audits]
    if mode == "several":
        report.sections.extend(_side_by_side(pairs, labels))
    joint = [one.findings for one in taken if one.place is None]
    for found in joint if mode != "pair" else []:
        report.add(found)
    for place in dict.fromkeys(one.place for one in pairs):
        assert place is not None
        of_place = [one.findings for one in pairs if one.place == place]
        numbers: dict[str, Any] = {key: value for found in of_place for key, value in found.numbers.items()}
        for found in of_place:
            report.add(_detail(found, labels[place]) if mode == "several" else found)
        if mode == "pair":
            report.numbers.update(numbers)
        elif mode in ("series", "run"):
            report.numbers["last"] = {"label": labels[place]} | numbers
        else:
            report.numbers.setdefault("checkpoints", []).append({"label": labels[place]} | numbers)
    for found in joint if mode == "pair" else []:  # of one checkpoint its changes come first
        report.add(found)
    for found in joint:
        report.numbers.update(found.numbers)
    for one in taken:
        if one.measure.audits:
            assert one.place is not None
            label = labels[one.place]
            report.numbers.setdefault(one.measure.name, []).append({"label": label} | one.findings.numbers)
            report.add(_labelled(one.findings, label) if len(labels) > 1 else one.findings)
    return report


def _side_by_side(pairs: list[Taken[Any]], labels: list[str]) -> list[Section]:
    sections = []
    for measure in dict.fromkeys(one.measure for one in pairs):
        assert isinstance(measure, PairMeasure)
        results = {labels[one.place]: one.result for one in pairs if one.measure is measure and one.place is not None}
        sections += measure.side_by_side(results)
    return sections


def _detail(findings: Findings, label: str) -> Findings:
    """Return the notes and, collapsed, the sections of one checkpoint of several; tables say of which they are."""
    sections = [
        dataclasses.replace(
            one,
            title=f"{one.title}: {label}",
            tables=[dataclasses.replace(table, title=f"{table.title}: {label}") for table in one.tables],
            collapsed=True,
        )
        for one in findings.sections
    ]
    return Findings(notes=[f"{label}: {note}" for note in findings.notes], sections=sections)


def _labelled(findings: Findings, label: str) -> Findings:
    """Return the findings with the checkpoint's label in every sentence and title."""
    return dataclasses.replace(
        findings,
        headlines=[f"{label}: {line}" for line in findings.headlines],
        notes=[f"{label}: {line}" for line in findings.notes],
        failed=[f"{label}: {line}" for line in findings.failed],
        sections=[dataclasses.replace(one, title=f"{one.title} ({label})") for one in findings.sections],
    )


def _document(report: Findings, comparison: Comparison, config: DiagnoseConfig) -> Document:
    published = [published_section(report.published)] if report.published else []
    numel = sum(map(comparison.numel, comparison.names))
    of_layers = f" of layers {config.layers}" if config.layers else ""
    bases = _bases(comparison)
    facts = [
        ("base", bases[0]) if comparison.one_base else ("bases of each", ", ".join(bases)),
        ("checkpoints" if len(comparison.tuned) > 1 else "tuned", _described(comparison.tuned)),
        ("weights", f"{numel:,} in {len(comparison.names)} tensors{of_layers}"),
        (
            "tolerance",
            f"{config.atol:g}, fixed (Mukherjee et al. 2025); {config.bf16_rtol:g}, bf16-aware (Zhu et al. 2025)",
        ),
    ]
    return Document(
        title="Which weights did training change?",
        facts=facts,
        headlines=[*report.failed, *report.headlines],
        notes=report.notes,
        unusual=unusual(report.published),
        sections=[*report.sections, *published],
    )


def _bases(comparison: Comparison) -> list[str]:
    """Return the label of each checkpoint's base."""
    return [text_safe(comparison.base_of(one).label) for one in comparison.tuned]


def _described(tuned: list[Checkpoint]) -> str:
    """Return the labels of checkpoints; of more than three of a run the first and the last with their number."""
    labels = [one.label for one in tuned]
    kind = " (deltas on top of the base)" if len(tuned) > 1 else " (delta on top of the base)"
    short = len(labels) > 3 and all(one.step is not None for one in tuned)
    shown = f"{labels[0]} to {labels[-1]}, {len(labels)} in all" if short else ", ".join(labels)
    return shown + (kind if all(one.is_delta for one in tuned) else "")
