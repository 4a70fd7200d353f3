"""`ssrctl diagnose --jaccard`: the coordinate sets of the steps within a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.run_dir import newest_run
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.io.console import console
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.measures.base import Findings, StepMeasure
from ssrctl.measures.step_geometry import StepGeometryMeasure
from ssrctl.measures.step_overlap import StepOverlapMeasure
from ssrctl.models.precision import suit_threads
from ssrctl.report.document import Document
from ssrctl.report.formats import percent, text_safe
from ssrctl.report.write import show_plan, write_report
from ssrctl.version import __version__

NAME = "diagnose-steps"
STEP_MEASURES: tuple[type[StepMeasure[Any, Any]], ...] = (StepOverlapMeasure, StepGeometryMeasure)


def diagnose_steps(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure the mask logs of a run and write the report.

    Raises:
        UserError: no run, no mask logs in it, or a log that cannot be read or contradicts itself.
    """
    folder = config.paths[0] if config.paths else newest_run("ssrctl diagnose --jaccard RUN")
    settings = _run_settings(folder)
    logs = _mask_logs(folder, settings)
    output = config.output_dir or folder
    if config.dry_run:
        return show_plan(logs, output, NAME, show=not config.json)
    settings = {"allocation": "disjoint"} | settings if settings else settings
    findings, sizes = _take([measure(settings) for measure in STEP_MEASURES], logs)
    report = Findings()
    for one in findings:
        report.add(one)
    report.notes.extend(_run_notes(len(set(sizes)) > 1, settings))
    coordinates, protected = sizes[-1]
    label = text_safe(folder.resolve().name)
    allocation = settings.get("allocation")
    numbers: dict[str, Any] = {
        "kind": "step-overlap",
        "ssrctl_version": __version__,
        "run": label,
        "allocation": None if allocation is None else str(allocation),
        "num_coordinates": coordinates,
        "num_protected": protected,
        "num_eligible": coordinates - protected,
        "headlines": report.headlines,
        "notes": report.notes,
    }
    for one in findings:
        numbers |= one.numbers
    share = percent(protected / coordinates if coordinates else None)
    steps = sorted(step["step"] for step in numbers["steps"])
    document = Document(
        title="Do reasoning steps update the same weights?",
        facts=[
            ("run", label),
            ("mask logs", f"{len(steps)}, training steps {steps[0]} to {steps[-1]}"),
            ("questions", str(numbers["summary"]["num_questions"])),
            ("allocation", numbers["allocation"] or "not recorded"),
            ("coordinates", f"{coordinates:,}, {protected:,} protected ({share})"),
        ],
        headlines=report.headlines,
        notes=report.notes,
        sections=[*report.sections, *report.details],
    )
    return write_report(numbers, document, output, NAME, show=not config.json)


def _run_settings(folder: Path) -> dict[str, Any]:
    """Return the run's own settings from its config.yaml; empty when it has none."""
    import yaml

    if not folder.is_dir():
        raise UserError(f"run directory not found: {folder}", "give the folder that `ssrctl train` wrote")
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}", "fix the file") from error
    if not isinstance(loaded, dict | None):
        raise UserError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}", "fix the file")
    return {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}


def _mask_logs(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    logs = list(mask_log_paths(folder))
    if logs:
        return logs
    if settings.get("optimizer") == "adamw":
        raise UserError(
            f"{folder} has no mask logs: it was trained with --optimizer adamw, whose updates are dense",
            "train with --optimizer kronos, or compare checkpoints: ssrctl diagnose BASE TUNED",
        )
    if settings.get("log_masks_every") == 0:
        raise UserError(
            f"{folder} has no mask logs: it was trained with --log-masks-every 0",
            "train with --log-masks-every 10 or so",
        )
    if not settings and not (folder / "masks").is_dir():
        raise UserError(
            f"{folder} is not a run directory: it has neither config.yaml nor masks/",
            "give the folder that `ssrctl train` wrote",
        )
    every = settings.get("log_masks_every")
    raise UserError(
        f"{folder} has no mask logs yet" + (f" (it logs every {every} training steps)" if every else ""),
        "train further, or with a smaller --log-masks-every",
    )


def _take(measures: Sequence[StepMeasure[Any, Any]], paths: list[Path]) -> tuple[list[Findings], list[tuple[int, int]]]:
    """Read the logs one at a time; return the findings of each measure, and (coordinates, protected) of each log."""
    from rich.progress import track

    parts: list[list[Any]] = [[] for _ in measures]
    sizes: list[tuple[int, int]] = []
    shown = console()
    for path in track(paths, "measuring overlap", console=shown, transient=True, disable=not shown.is_terminal):
        log = load_mask_log(path)
        suit_threads(log.num_coordinates)
        try:
            for measure, kept in zip(measures, parts, strict=True):
                kept.append(measure.log(log))
        except ValueError as error:
            raise UserError(f"{path}: the log contradicts itself: {error}", "log the run again") from error
        sizes.append((log.num_coordinates, log.num_protected))
    findings = [measure.present(measure.combine(kept)) for measure, kept in zip(measures, parts, strict=True)]
    return findings, sizes


def _run_notes(protected_changed: bool, settings: Mapping[str, Any]) -> list[str]:
    notes = []
    if protected_changed:
        notes.append("The protected set changed during the run; expectations use each training step's own.")
    if settings.get("reuse_factor"):
        notes.append(f"The run allowed reuse of claimed coordinates (--reuse-factor {settings['reuse_factor']}).")
    return notes
