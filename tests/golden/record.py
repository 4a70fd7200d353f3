"""Record what every command makes, and compare two recordings exactly.

    python tests/golden/record.py OUT.json [--only PATTERN] [--repository FOLDER] [--keep FOLDER]
    python tests/golden/record.py --compare OLD.json NEW.json [--text] [--leaves]

Commands are run as ``python -m ssrctl ...`` in a temporary folder; nothing is imported from the package, so that its
inside can change between two recordings.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from commands import PLANTED, Job, jobs
from comparing import Differences, compare
from reading import clean, read_folder

FORMAT = "ssrctl-golden"
LONGEST_LISTS = 200  # lines that are printed of one kind of difference


def main() -> int:
    """Record or compare; the exit code is 1 when something differs or a command did not end as it should."""
    given = _arguments()
    if given.compare is not None:
        old, new = (_read(path) for path in given.compare)
        return _report(old, new, compare(old["jobs"], new["jobs"], leaves=given.leaves), text=given.text)
    repository = given.repository.resolve()
    with contextlib.ExitStack() as stack:
        if given.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-"))).resolve()
        else:
            given.keep.mkdir(parents=True)
            folder = given.keep.resolve()
        wanted = _with_needs(given.only)
        started = time.monotonic()
        made, wrong = _run_all(wanted, folder, repository, workers=given.workers)
        kept = {name: held for name, held in made.items() if fnmatch.fnmatch(name, given.only)}
    recording = {"format": FORMAT, "made_with": _made_with(), "jobs": kept}
    given.output.write_text(json.dumps(recording, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _say(f"wrote {given.output}: {len(kept)} jobs, {time.monotonic() - started:.0f} s")
    return int(wrong)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", help="recording to write (json)")
    parser.add_argument("--only", default="*", help="record only jobs whose names match this glob pattern")
    parser.add_argument(
        "--repository", type=Path, default=Path(__file__).parents[2], help="folder that holds the package to run"
    )
    parser.add_argument("--workers", type=int, default=2, help="commands at once")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two recordings")
    parser.add_argument("--text", action="store_true", help="with --compare: texts have to be equal too")
    parser.add_argument(
        "--leaves", action="store_true", help="with --compare: where names differ, the same numbers are enough"
    )
    given = parser.parse_args()
    if (given.output is None) == (given.compare is None):
        parser.error("give either a file to write or --compare OLD NEW")
    return given


# --------------------------------------------------------------------------------------------------
# recording


def _with_needs(pattern: str) -> list[Job]:
    """The jobs that match, and those whose files they read, in order."""
    listed = jobs()
    wanted: set[str] = set()
    for job in reversed(listed):
        if job.name in wanted or fnmatch.fnmatch(job.name, pattern):
            wanted |= {job.name} | job.needs
    return [job for job in listed if job.name in wanted]


def _run_all(wanted: list[Job], folder: Path, repository: Path, *, workers: int) -> tuple[dict[str, Any], bool]:
    """Run the jobs, each after those that it needs: (what is kept of each, whether one ended as it should not)."""
    from planted import plant

    plant(folder / PLANTED)
    made: dict[str, Any] = {PLANTED: {"files": read_folder(folder / PLANTED, str(folder))}}
    environment = _environment(repository)
    futures: dict[str, Future[tuple[dict[str, Any], bool]]] = {}

    def one(job: Job) -> tuple[dict[str, Any], bool]:
        # Needs come earlier in the list, so they have been started, and no wait can last for ever.
        for need in job.needs - {PLANTED}:
            futures[need].result()
        return _run(job, folder, environment)

    with ThreadPoolExecutor(workers) as pool:
        for job in wanted:
            futures[job.name] = pool.submit(one, job)
        wrong = False
        for name, future in futures.items():
            made[name], failed = future.result()
            wrong |= failed
    return made, wrong


def _run(job: Job, folder: Path, environment: dict[str, str]) -> tuple[dict[str, Any], bool]:
    started = time.monotonic()
    codes, out = [], ""
    (folder / job.name).mkdir(parents=True)
    for command in job.commands:
        words = [sys.executable, "-m", "ssrctl", *job.words(command)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        out = done.stdout
        if done.returncode != (job.code if command == job.commands[-1] else 0):
            _say(f"{job.name}: exit code {done.returncode}: {' '.join(words[3:])}\n{done.stderr[-2000:]}")
    kept: dict[str, Any] = {"codes": codes, "files": read_folder(folder / job.name, str(folder))}
    if job.stdout and out.strip():
        kept["stdout"] = clean(json.loads(out), str(folder))
    _say(f"{job.name}: {time.monotonic() - started:.1f} s")
    return kept, codes != [0] * (len(codes) - 1) + [job.code]


def _environment(repository: Path) -> dict[str, str]:
    """The variables of this process, with one thread, no network, no accelerator, and the package from the repository."""
    fixed = {
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
    }
    return dict(os.environ) | fixed


def _made_with() -> dict[str, str]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": capability}


# --------------------------------------------------------------------------------------------------
# comparing


def _read(path: Path) -> dict[str, Any]:
    held = json.loads(path.read_text(encoding="utf-8"))
    if held.get("format") != FORMAT:
        sys.exit(f"{path} is no recording")
    return held


def _report(old: dict[str, Any], new: dict[str, Any], found: Differences, *, text: bool) -> int:
    if old["made_with"] != new["made_with"]:
        _say(f"note: made with {old['made_with']} and {new['made_with']}; numbers may differ for that alone")
    for title, lines in (("numbers and hashes", found.exact), ("moved", found.moved), ("text", found.text)):
        if lines:
            _say(f"== {title}: {len(lines)}")
            _say("\n".join(lines[:LONGEST_LISTS]))
            if len(lines) > LONGEST_LISTS:
                _say(f"... and {len(lines) - LONGEST_LISTS} more")
    failed = bool(found.exact) or (text and bool(found.text))
    said = "differ" if failed else "equal"
    counts = f"{len(found.exact)} differences, {len(found.moved)} moved, {len(found.text)} in text"
    _say(f"{said}: {found.compared} numbers and hashes compared: {counts}")
    return int(failed)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
