"""`ssrctl diagnose BASE TUNED...` and `ssrctl diagnose RUN`: what updates did to checkpoints."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import CheckFailed, UserError
from ssrctl.report.document import Document, Section, Table
from ssrctl.report.formats import number, percent, text_safe
from ssrctl.stages.diagnose import measure
from ssrctl.stages.diagnose.deliver import deliver, show_plan
from ssrctl.stages.diagnose.inputs import Inputs, Tuned, checkpoints_of, is_run, open_inputs
from ssrctl.version import __version__

if TYPE_CHECKING:
    from ssrctl.core.mask import BlockMask

_DEFAULT_FOLDER = Path("diagnose")


@dataclass
class _Report:
    """What grows as families of measures are taken."""

    numbers: dict[str, Any] = field(default_factory=dict)
    headlines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    published: dict[Any, float | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def diagnose_checkpoints(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure checkpoints against their base and write the report.

    Raises:
        UserError: inputs that cannot be opened or do not fit each other, or nothing to measure.
        CheckFailed: the report is written, and ``--assert-frozen`` or ``--assert-moved`` does not hold.
    """
    base, paths, run = _what(config)
    output = config.output_dir or run or _DEFAULT_FOLDER
    series = config.series or run is not None
    _check_measures(config, len(paths), series=series, of_run=run is not None)
    if output.exists() and not output.is_dir():  # said now, not when everything is measured
        raise UserError(f"{output} is a file", "name a folder for the report")
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(stack, base, paths, config)
        mask = measure.protected_weights(inputs, config)  # before anything slow
        if config.dry_run:
            return show_plan(config, _files(inputs, paths), output)
        report = _Report(notes=inputs.notes)
        if series:
            _series(report, inputs, config, run)
        elif len(inputs.tuned) > 1:
            _several(report, inputs, config)
        else:
            _pair(report, inputs, inputs.tuned[0], config)
        _audit(report, inputs, inputs.tuned[-1:] if series else inputs.tuned, mask, config)
        document = _document(report, inputs, config)
    kind = "run-over-time" if series else "checkpoint-difference" if len(inputs.tuned) == 1 else "several-checkpoints"
    made = deliver(config, _json(report, kind, inputs, config), document, output)
    if report.failed:
        raise CheckFailed(" ".join(report.failed))
    return made


def _what(config: DiagnoseConfig) -> tuple[Path, list[Path], Path | None]:
    """(base, checkpoints, the run that they are all of)."""
    if len(config.paths) > 1:
        return config.paths[0], config.paths[1:], None
    (run,) = config.paths
    if not is_run(run):
        raise UserError(
            f"{run} is no run directory with checkpoints, and there is nothing to compare it with",
            "name a run of ssrctl train, or a base and a tuned checkpoint: ssrctl diagnose BASE TUNED",
        )
    base, checkpoints = checkpoints_of(run)
    return base, checkpoints, run


def _check_measures(config: DiagnoseConfig, num_tuned: int, *, series: bool, of_run: bool) -> None:
    """Refuse a measure that was asked for by name and that these paths cannot give."""
    if config.measures is not None and not config.measures.strip():
        raise UserError("--measures names no measure", "leave it out for all of them")
    needs = {
        "overlap": (num_tuned > 1 and not series, "two or more checkpoints of one base, not in a series"),
        "time": (series, "--series, or a run"),
        "gradients": (of_run, "a run that was trained with --log-gradients"),
    }
    for name, (possible, need) in needs.items():
        if config.wants(name, default=False) and not possible:
            raise UserError(f"--measures {name} cannot be taken of these paths", f"it needs {need}")


def _files(inputs: Inputs, paths: list[Path]) -> list[Path]:
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by

    files = list(inputs.base.files)
    for path, tuned in zip(paths, inputs.tuned, strict=True):
        delta = delta_meant_by(path)
        if delta is not None:
            files.append(delta)
        elif isinstance(tuned.reader, TensorReader):
            files += tuned.reader.files
    return files


# --------------------------------------------------------------------------------------------------
# the three kinds of comparison


def _pair(report: _Report, inputs: Inputs, tuned: Tuned, config: DiagnoseConfig) -> None:
    changes = _sparsity(report, inputs, tuned, config)
    if any(config.wants(name, default=True) for name in ("rank", "spectrum", "landing")):
        _matrices(report, inputs, tuned, changes, config)


def _sparsity(report: _Report, inputs: Inputs, tuned: Tuned, config: DiagnoseConfig) -> Any:
    """The size of the change and how many weights it touched: always counted, shown if wanted."""
    from ssrctl.measures.sparsity_report import (
        headlines,
        nonfinite_note,
        size_section,
        sparsity_numbers,
        sparsity_sections,
    )

    changes, movers = measure.compare(inputs, tuned, config)
    numbers = sparsity_numbers(changes, movers, inputs.base.shapes)
    report.numbers |= numbers
    if (odd := nonfinite_note(numbers["total"])) is not None:
        report.notes.append(odd)
    if config.wants("sparsity", default=True):
        report.headlines += headlines(numbers, config.atol)
        report.sections += sparsity_sections(numbers, config.atol)
        report.published |= _published_sparsity(numbers["total"])
    elif config.wants("size", default=True):
        report.sections.append(size_section(numbers))
    return changes


def _published_sparsity(total: dict[str, Any]) -> dict[str, float | None]:
    from ssrctl.measures.maths.change import FIXED_TOLERANCES, tolerance_key

    found = {f"sparsity_{atol:.0e}".replace("e-0", "e-"): total[tolerance_key(atol)] for atol in FIXED_TOLERANCES}
    return found | {"sparsity_bf16": total["sparsity_bf16"]}


def _matrices(report: _Report, inputs: Inputs, tuned: Tuned, changes: Any, config: DiagnoseConfig) -> None:
    from ssrctl.measures import landing_report, spectrum_report
    from ssrctl.measures.rank_report import rank_section

    numbers = measure.matrices(inputs, tuned, changes, config)
    report.numbers |= numbers
    report.headlines += spectrum_report.headlines(numbers)
    report.notes += spectrum_report.notes(numbers)
    if numbers["rank"] is not None:
        report.sections.append(rank_section(numbers["rank"]))
        report.published["rank"] = numbers["rank"]["total"]["rank_frac"]
    if numbers["spectrum"] is not None:
        report.sections.append(spectrum_report.spectrum_section(numbers["spectrum"]))
    if "landing" in numbers:
        report.headlines += landing_report.headlines(numbers["landing"])
        report.sections.append(landing_report.landing_section(numbers["landing"]))


def _several(report: _Report, inputs: Inputs, config: DiagnoseConfig) -> None:
    """Each checkpoint's sparsity side by side, and what they have in common."""
    from ssrctl.measures import overlap_report as run_overlap_report

    report.numbers["checkpoints"] = []
    details: list[Section] = []
    for tuned in inputs.tuned:
        one = _Report()
        _pair(one, inputs, tuned, _chosen_only(config))
        report.numbers["checkpoints"].append({"label": tuned.label} | one.numbers)
        report.notes += [f"{tuned.label}: {note}" for note in one.notes]
        for section in one.sections:
            section.title = f"{section.title}: {tuned.label}"
            section.collapsed = True
        details += one.sections
    report.sections.append(_side_by_side(report.numbers["checkpoints"], config))
    if config.wants("overlap", default=True):
        numbers = measure.overlap(inputs, config)
        report.numbers["overlap"] = numbers
        report.headlines += run_overlap_report.headlines(numbers)
        report.sections.append(run_overlap_report.run_overlap_section(numbers, published=config.rule == "bf16"))
        report.published |= {"run_overlap": numbers["total"]["one_sided"], "run_jaccard": numbers["total"]["jaccard"]}
    report.sections += details


def _chosen_only(config: DiagnoseConfig) -> DiagnoseConfig:
    """The same, with the slow measures only if they were asked for by name."""
    import dataclasses

    return dataclasses.replace(config, measures="sparsity,size") if config.measures is None else config


def _side_by_side(rows: list[dict[str, Any]], config: DiagnoseConfig) -> Section:
    totals = [(row["label"], row["total"]) for row in rows]
    return Section(
        title="The checkpoints side by side",
        tables=[
            Table(
                title="Against the base",
                columns=["checkpoint", f"within {config.atol:g}", "bf16-aware", "bit-equal", "relative L2", "max |d|"],
                rows=[
                    [
                        label,
                        percent(total["sparsity"]),
                        percent(total["sparsity_bf16"]),
                        percent(total["bit_equal_frac"]),
                        number(total["relative_l2"]),
                        number(total["max_abs_difference"]),
                    ]
                    for label, total in totals
                ],
                note="Shares of unchanged weights by three rules; norm of the update over that of the base.",
            )
        ],
    )


def _series(report: _Report, inputs: Inputs, config: DiagnoseConfig, run: Path | None) -> None:
    """The run over time, and what it ended with."""
    from ssrctl.measures import over_time_report

    if config.wants("time", default=True):
        numbers = measure.over_time(inputs, config)
        report.numbers["over_time"] = numbers
        report.headlines += over_time_report.headlines(numbers)
        report.sections.append(
            over_time_report.over_time_section(
                numbers, {"atol": "sparsity_1e-5", "bf16": "sparsity_bf16", "bits": None}[config.rule]
            )
        )
        moved = [1 - share for share in numbers["total"]["neighbour_sparsity"] if share is not None]
        report.published |= {
            "changed_per_checkpoint": sum(moved) / len(moved) if moved else None,
            "outside_final": numbers["total"]["outside_final_of_ever"],
        }
    if run is not None and config.wants("gradients", default=True):
        _gradients(report, run, asked=config.measures is not None)
    one = _Report()
    _pair(one, inputs, inputs.tuned[-1], _chosen_only(config))
    report.numbers["last"] = {"label": inputs.tuned[-1].label} | one.numbers
    report.headlines += one.headlines
    report.notes += one.notes
    report.sections += one.sections
    report.published |= one.published


def _gradients(report: _Report, run: Path, *, asked: bool) -> None:
    from ssrctl.io.gradient_log import gradient_log_paths
    from ssrctl.measures import gradients_report as gradient_report
    from ssrctl.measures.gradients import gradient_numbers

    paths = gradient_log_paths(run)
    if not paths:
        if asked:
            raise UserError(f"{run} has no gradient logs", "train with --log-gradients 10 or so")
        return
    numbers = gradient_numbers(paths)
    section = gradient_report.gradient_section(numbers)
    if section is not None:
        report.numbers["gradients"] = numbers
        report.headlines += gradient_report.headlines(numbers)
        report.sections.append(section)


def _audit(
    report: _Report, inputs: Inputs, audited: list[Tuned], mask: BlockMask | None, config: DiagnoseConfig
) -> None:
    """Did protected weights move; of a series only the last checkpoint counts."""
    if config.protect is None and config.assert_frozen is None and config.assert_moved is None:
        return
    from ssrctl.measures import audit_report
    from ssrctl.measures.audit import failures

    for tuned in audited:
        numbers = measure.audit(inputs, tuned, mask, config)
        report.numbers.setdefault("audit", []).append({"label": tuned.label} | numbers)
        label = tuned.label if len(inputs.tuned) > 1 else ""
        before = f"{label}: " if label else ""
        report.headlines += [before + line for line in audit_report.headlines(numbers)]
        report.sections.append(audit_report.audit_section(numbers, label))
        found = failures(numbers, frozen=config.assert_frozen is not None, moved_pattern=config.assert_moved)
        report.failed += [before + line for line in found]


# --------------------------------------------------------------------------------------------------
# the report


def _document(report: _Report, inputs: Inputs, config: DiagnoseConfig) -> Document:
    from ssrctl.measures.published import published_section, unusual

    sections = list(report.sections)
    if report.published:
        sections.append(published_section(report.published))
    numel = sum(math.prod(inputs.base.shapes[name]) for name in inputs.names)
    many = len(inputs.tuned) > 1
    facts = [
        ("base", text_safe(inputs.base.label)),
        ("checkpoints" if many else "tuned", ", ".join(map(_described, inputs.tuned))),
        (
            "weights",
            f"{numel:,} in {len(inputs.names)} tensors" + (f" of layers {config.layers}" if config.layers else ""),
        ),
        ("tolerance", f"{config.atol:g}, fixed (Mukherjee et al. 2025); {config.eta:g}, bf16-aware (Zhu et al. 2025)"),
    ]
    return Document(
        title="Which weights did training change?",
        facts=facts,
        headlines=[*report.failed, *report.headlines],
        notes=report.notes,
        unusual=unusual(report.published),
        sections=sections,
    )


def _json(report: _Report, kind: str, inputs: Inputs, config: DiagnoseConfig) -> dict[str, Any]:
    labels = [tuned.label for tuned in inputs.tuned]
    return {
        "kind": kind,
        "ssrctl_version": __version__,
        "base": text_safe(inputs.base.label),
        "tuned": labels[0] if len(labels) == 1 else labels,
        "atol": config.atol,
        "eta": config.eta,
        "rule": config.rule,
        "failed": report.failed,
        "headlines": report.headlines,
        "notes": report.notes,
        **report.numbers,
    }


def _described(tuned: Tuned) -> str:
    return tuned.label + (" (delta on top of the base)" if tuned.is_delta else "")
