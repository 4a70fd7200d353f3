"""`ssrctl diagnose --jaccard`: the coordinate sets of the steps within a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.io.console import console, note
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.report.formats import percent, text_safe, times
from ssrctl.report.write import write_report
from ssrctl.stages.diagnose.plan import show_plan
from ssrctl.version import __version__

if TYPE_CHECKING:
    from ssrctl.measures.step_geometry import QuestionGeometry
    from ssrctl.measures.step_overlap import StepOverlap

_RUNS = Path("runs")


def diagnose_steps(config: DiagnoseConfig) -> dict[str, Any]:
    from ssrctl.measures.step_geometry import summarise_geometry
    from ssrctl.measures.step_geometry_report import geometry_headlines, geometry_notes, geometry_sections
    from ssrctl.measures.step_overlap_report import disjoint_by_construction, headlines, overlap_document
    from ssrctl.measures.step_overlap_summary import summarise_run

    folder = config.paths[0] if config.paths else _newest_run()
    settings = _run_settings(folder)
    logs = _mask_logs(folder, settings)
    output = config.output_dir or folder
    if config.dry_run:
        return show_plan(config, logs, output)
    steps, questions, sizes = _measure_logs(logs)
    summary, geometry = summarise_run(steps), summarise_geometry(questions)
    allocation, reuse = _allocation(settings), settings.get("reuse_factor")
    sentences = headlines(summary, disjoint_by_construction(allocation, reuse)) + geometry_headlines(geometry)
    coordinates, protected = sizes[-1]
    notes = _run_notes(summary.num_single, summary.num_questions, len(set(sizes)) > 1, settings)
    notes += geometry_notes(geometry)
    label = text_safe(folder.resolve().name)
    report = {
        "kind": "step-overlap",
        "ssrctl_version": __version__,
        "run": label,
        "allocation": allocation,
        "num_coordinates": coordinates,
        "num_protected": protected,
        "num_eligible": coordinates - protected,
        "headlines": sentences,
        "notes": notes,
        "summary": dataclasses.asdict(summary),
        "steps": [dataclasses.asdict(step) for step in steps],
        "before_masking": {
            "summary": dataclasses.asdict(geometry),
            "questions": [dataclasses.asdict(question) for question in questions],
        },
    }
    training = [step.step for step in steps]
    facts = [
        ("run", label),
        ("mask logs", f"{len(training)}, training steps {min(training)} to {max(training)}"),
        ("questions", str(summary.num_questions)),
        ("allocation", allocation or "not recorded"),
        (
            "coordinates",
            f"{coordinates:,}, {protected:,} protected ({percent(protected / coordinates if coordinates else None)})",
        ),
    ]
    document = overlap_document(steps, summary, facts, sentences, notes, geometry_sections(geometry))
    return write_report(report, document, output, show=not config.json)


def _newest_run() -> Path:
    """The run under ``runs/`` whose metrics or masks were written to last; says which on stderr."""
    runs = [one for one in _RUNS.glob("*") if (one / "config.yaml").exists() or (one / "masks").is_dir()]
    if not runs:
        raise UserError(
            f"no run found under {_RUNS}/ in the current folder",
            "name one: ssrctl diagnose --jaccard RUN; `ssrctl train` makes them",
        )
    newest = max(runs, key=lambda one: (_written(one), one.name))
    note(f"reading {newest}, the newest of {times(len(runs), 'run')} under {_RUNS}/")
    return newest


def _written(run_folder: Path) -> float:
    places = [run_folder / "metrics.jsonl", *mask_log_paths(run_folder)]
    times = [one.stat().st_mtime for one in places if one.exists()]
    return max(times, default=run_folder.stat().st_mtime)


def _run_settings(folder: Path) -> dict[str, Any]:
    """The run's own settings from its config.yaml; empty when it has none."""
    import yaml

    if not folder.is_dir():
        raise UserError(f"run directory not found: {folder}", "give the folder that `ssrctl train` wrote")
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}", "mend the file") from error
    if not isinstance(loaded, dict | None):
        raise UserError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}", "mend the file")
    return {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}


def _allocation(settings: Mapping[str, Any]) -> str | None:
    """How the run gave coordinates to steps; None when it left no config."""
    if not settings:
        return None
    return str(settings.get("allocation", "disjoint"))


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
            f"{folder} is no run directory: it has neither config.yaml nor masks/",
            "give the folder that `ssrctl train` wrote",
        )
    every = settings.get("log_masks_every")
    raise UserError(
        f"{folder} has no mask logs yet" + (f" (it logs every {every} training steps)" if every else ""),
        "train further, or with a smaller --log-masks-every",
    )


def _measure_logs(paths: list[Path]) -> tuple[list[StepOverlap], list[QuestionGeometry], list[tuple[int, int]]]:
    """Measure the logs one at a time; also (coordinates, protected) of each."""
    from rich.progress import track

    from ssrctl.measures.step_geometry import measure_step_geometry
    from ssrctl.measures.step_overlap import measure_step

    steps: list[StepOverlap] = []
    questions: list[QuestionGeometry] = []
    sizes: list[tuple[int, int]] = []
    for path in track(paths, "measuring overlap", console=console(), transient=True, disable=not console().is_terminal):
        log = load_mask_log(path)
        try:
            steps.append(measure_step(log))
            questions += measure_step_geometry(log)
        except ValueError as error:
            raise UserError(f"{path}: the log contradicts itself: {error}", "log the run again") from error
        sizes.append((log.num_coordinates, log.num_protected))
    return steps, questions, sizes


def _run_notes(single: int, questions: int, protected_changed: bool, settings: Mapping[str, Any]) -> list[str]:
    notes = []
    if single:
        notes.append(f"Of {times(questions, 'question')}, {single} had fewer than two update units and so no pairs.")
    if protected_changed:
        notes.append("The protected set changed during the run; expectations use each training step's own.")
    if settings.get("reuse_factor"):
        notes.append(f"The run allowed reuse of claimed coordinates (--reuse-factor {settings['reuse_factor']}).")
    return notes
