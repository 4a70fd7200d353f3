"""`ssrctl diagnose`: what updates did, between the steps of a run or between two checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ssrctl
from ssrctl.analysis.document import Document, json_safe, percent, text_safe, times
from ssrctl.analysis.render import html_page, missing_libraries, print_document
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.io.files import write_text
from ssrctl.io.mask_log import load_mask_log, mask_log_paths

if TYPE_CHECKING:
    from rich.console import Console

    from ssrctl.analysis.overlap import StepOverlap
    from ssrctl.analysis.sparsity import Change
    from ssrctl.io.checkpoint_reader import DeltaReader, TensorReader

_RUNS = Path("runs")
_DEFAULT_FOLDER = Path("diagnose")
_PLAIN_WIDTH = 120


def run(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure, write ``report.json`` and ``report.html``, and show the tables on stdout (unless ``--json``).

    Returns:
        The report, as in report.json; under ``--dry-run`` the plan.

    Raises:
        UserError: nothing to measure, or inputs that do not fit each other.
    """
    return _diagnose_run(config) if config.jaccard else _diagnose_pair(config)


# --------------------------------------------------------------------------------------------------
# the steps of a run


def _diagnose_run(config: DiagnoseConfig) -> dict[str, Any]:
    from ssrctl.analysis.overlap_report import disjoint_by_construction, headlines, overlap_document
    from ssrctl.analysis.overlap_summary import summarise_run

    folder = config.paths[0] if config.paths else _newest_run()
    settings = _run_settings(folder)
    logs = _mask_logs(folder, settings)
    output = config.output_dir or folder
    if config.dry_run:
        return _plan(config, logs, output)
    steps, sizes = _measure_logs(logs)
    summary = summarise_run(steps)
    allocation, reuse = _allocation(settings), settings.get("reuse_factor")
    sentences = headlines(summary, disjoint_by_construction(allocation, reuse))
    coordinates, protected = sizes[-1]
    notes = _run_notes(summary.num_single, summary.num_questions, len(set(sizes)) > 1, settings)
    label = text_safe(folder.resolve().name)
    report = {
        "kind": "step-overlap",
        "ssrctl_version": ssrctl.__version__,
        "run": label,
        "allocation": allocation,
        "num_coordinates": coordinates,
        "num_protected": protected,
        "num_eligible": coordinates - protected,
        "headlines": sentences,
        "notes": notes,
        "summary": dataclasses.asdict(summary),
        "steps": [dataclasses.asdict(step) for step in steps],
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
    return _deliver(config, report, overlap_document(steps, summary, facts, sentences, notes), output)


def _newest_run() -> Path:
    """The run under ``runs/`` whose metrics or masks were written to last; says which on stderr."""
    runs = [one for one in _RUNS.glob("*") if (one / "config.yaml").exists() or (one / "masks").is_dir()]
    if not runs:
        raise UserError(
            f"no run found under {_RUNS}/ in the current folder",
            "name one: ssrctl diagnose --jaccard RUN; `ssrctl train` makes them",
        )
    newest = max(runs, key=lambda one: (_written(one), one.name))
    _say(f"reading {newest}, the newest of {times(len(runs), 'run')} under {_RUNS}/")
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


def _measure_logs(paths: list[Path]) -> tuple[list[StepOverlap], list[tuple[int, int]]]:
    """Measure the logs one at a time; also (coordinates, protected) of each."""
    from rich.progress import track

    from ssrctl.analysis.overlap import measure_step

    steps, sizes = [], []
    for path in track(paths, "measuring overlap", console=_stderr(), transient=True, disable=not _stderr().is_terminal):
        log = load_mask_log(path)
        try:
            steps.append(measure_step(log))
        except ValueError as error:
            raise UserError(f"{path}: the log contradicts itself: {error}", "log the run again") from error
        sizes.append((log.num_coordinates, log.num_protected))
    return steps, sizes


def _run_notes(single: int, questions: int, protected_changed: bool, settings: Mapping[str, Any]) -> list[str]:
    notes = []
    if single:
        notes.append(f"Of {times(questions, 'question')}, {single} had fewer than two update units and so no pairs.")
    if protected_changed:
        notes.append("The protected set changed during the run; expectations use each training step's own.")
    if settings.get("reuse_factor"):
        notes.append(f"The run allowed reuse of claimed coordinates (--reuse-factor {settings['reuse_factor']}).")
    return notes


# --------------------------------------------------------------------------------------------------
# two checkpoints


def _diagnose_pair(config: DiagnoseConfig) -> dict[str, Any]:
    from ssrctl.analysis.sparsity_report import headlines, nonfinite_note, sparsity_document, sparsity_numbers
    from ssrctl.io.checkpoint_reader import TensorReader, delta_meant_by, matching_names, open_delta

    base_path, tuned_path = config.paths
    output = config.output_dir or _DEFAULT_FOLDER
    if delta_meant_by(base_path) is not None:
        raise UserError(f"BASE {base_path} is a delta, not whole weights", "give the model that the run started from")
    delta_path = delta_meant_by(tuned_path)
    tuned: TensorReader | DeltaReader
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(TensorReader(base_path))
        if delta_path is None:
            tuned = stack.enter_context(TensorReader(tuned_path))
            names, notes = matching_names(base, tuned)
        if config.dry_run:
            others = [delta_path] if delta_path is not None else tuned.files  # type: ignore[union-attr]
            return _plan(config, [*base.files, *others], output)
        if delta_path is not None:
            tuned = open_delta(delta_path, base)
            names, notes = _delta_names(base, tuned)
        base_label, tuned_label = text_safe(base.label), text_safe(tuned.label)
        notes += _dtype_notes(base, tuned, names)
        changes = _compare(base, tuned, names, config.atol)
    numbers = sparsity_numbers(changes)
    sentences = headlines(numbers, config.atol)
    if (odd := nonfinite_note(numbers["total"])) is not None:
        notes.append(odd)
    report = {
        "kind": "checkpoint-difference",
        "ssrctl_version": ssrctl.__version__,
        "base": base_label,
        "tuned": tuned_label,
        "atol": config.atol,
        "headlines": sentences,
        "notes": notes,
        **numbers,
    }
    facts = [
        ("base", base_label),
        ("tuned", tuned_label + (" (delta on top of the base)" if delta_path is not None else "")),
        ("weights", f"{numbers['total']['numel']:,} in {len(names)} tensors"),
        ("tolerance", f"{config.atol:g}, fixed (Mukherjee et al. 2025)"),
    ]
    return _deliver(config, report, sparsity_document(numbers, facts, sentences, notes, config.atol), output)


def _delta_names(base: TensorReader, tuned: DeltaReader) -> tuple[list[str], list[str]]:
    """(the tensors that were trained, notes on those of the base that were not)."""
    names = sorted(tuned.shapes)
    left_out = sorted(set(base.shapes) - set(names))
    if not left_out:
        return names, []
    return names, [
        f"{len(left_out)} tensors of the base are no parameters of the trained model (tied copies or buffers) and were "
        f"left out: {_first(left_out)}."
    ]


def _dtype_notes(base: TensorReader, tuned: TensorReader | DeltaReader, names: list[str]) -> list[str]:
    """Sentences on tensors whose dtypes differ, or that hold no floating-point numbers."""
    from ssrctl.analysis.sparsity import common_dtype
    from ssrctl.io.checkpoint_reader import DeltaReader

    notes = []
    if isinstance(tuned, DeltaReader) and tuned.load_dtype is not None:
        asked = str(tuned.load_dtype).removeprefix("torch.")
        notes.append(
            f"The base's config.json asks for {asked}: its weights were rounded to that, as the run loaded them."
        )
    counts = collections.Counter(
        (base.dtypes[name], tuned.dtypes[name]) for name in names if base.dtypes[name] != tuned.dtypes[name]
    )
    for (before, after), number in counts.items():
        a, b = (str(dtype).removeprefix("torch.") for dtype in (before, after))
        if not isinstance(tuned, DeltaReader):
            wide = str(common_dtype(before, after)).removeprefix("torch.")
            notes.append(f"{number} tensors are {a} in BASE and {b} in TUNED; they were compared in {wide}.")
        elif common_dtype(before, after) == after:
            notes.append(
                f"The run trained in {b} from a base stored as {a}; {number} changed tensors were upcast, exactly."
            )
        else:
            notes.append(
                f"The run trained in {b} from a base stored as {a}; {number} changed tensors of the base were "
                f"rounded to {b}, which is what the run began from."
            )
    whole = [name for name in names if not base.dtypes[name].is_floating_point]
    if whole:
        notes.append(
            f"{len(whole)} tensors hold no floating-point numbers (quantised weights or buffers), so differences of "
            f"their codes were counted: {_first(whole)}."
        )
    return notes


def _compare(base: TensorReader, tuned: TensorReader | DeltaReader, names: list[str], atol: float) -> dict[str, Change]:
    """One tensor at a time."""
    from rich.progress import track

    from ssrctl.analysis.sparsity import compare_tensors
    from ssrctl.io.checkpoint_reader import DeltaReader

    original = tuned.base_tensor if isinstance(tuned, DeltaReader) else base.tensor
    console = _stderr()
    shown = track(names, "comparing tensors", console=console, transient=True, disable=not console.is_terminal)
    return {name: compare_tensors(original(name), tuned.tensor(name), atol) for name in shown}


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# --------------------------------------------------------------------------------------------------
# what comes out


def _plan(config: DiagnoseConfig, reads: Sequence[Path], output: Path) -> dict[str, Any]:
    """What would be read and written; shown on stdout unless ``--json``."""
    writes = [output / "report.json"] + ([] if missing_libraries() else [output / "report.html"])
    plan = {
        "reads": [{"path": str(path), "bytes": path.stat().st_size} for path in reads],
        "writes": [str(path) for path in writes],
    }
    if not config.json:
        lines = [f"would read {path} ({path.stat().st_size:,} bytes)" for path in reads]
        lines += [f"would write {path}" + (" (replacing it)" if path.exists() else "") for path in writes]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return plan


def _deliver(config: DiagnoseConfig, report: dict[str, Any], document: Document, output: Path) -> dict[str, Any]:
    """Write the report, show the tables, and say where everything is."""
    from rich.console import Console

    safe = json_safe(report)
    text = json.dumps(safe, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(output / "report.json", text + "\n")
    written = [output / "report.json"]
    missing = missing_libraries()
    if not missing:
        write_text(output / "report.html", html_page(document, ssrctl.__version__))
        written.append(output / "report.html")
    if not config.json:
        # Without a terminal there is no width to fit, and folded cells are hard to read.
        print_document(document, Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH), written[-1].name)
    _say("wrote " + " and ".join(str(path) for path in written))
    if missing:
        old = output / "report.html"
        _say(
            f"no report.html: {' and '.join(missing)} not installed; pip install 'ssrctl[report]'"
            + (f" ({old} is from an earlier report)" if old.exists() else "")
        )
    return safe


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def _say(line: str) -> None:
    from rich.text import Text

    _stderr().print(Text(line))
