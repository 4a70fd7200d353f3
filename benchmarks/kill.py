"""Nothing is lost when `ssrctl train` is killed, terminated, or finds the disk full.

One run of the bundled reasoner is left alone. A second one is killed (SIGKILL) at random moments and continued each time
with the same command, until it was killed as often as asked and has finished; a third is terminated (SIGTERM); the others
run on disks of three sizes, which fill up, and continue when room was made. Checked each time: the exit code (3 after
SIGTERM, 2 on a full disk), one line of error and one of remedy without a traceback, that no step counted as done was lost
after SIGTERM, and no half checkpoint or temporary file after a stop. At the end the last delta, its optimizer state and the
metrics (without times) equal those of the run that was left alone, byte for byte.

The small disks are tmpfs mounts, which need root on Linux; without it that part is skipped and says why.

    python benchmarks/kill.py [--kills 60] [--terms 20] [--max-steps 12] [--kibibytes 150 1200 2600]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, table

TIMES = ("peak_memory_bytes", "tokens_per_second", "sample_seconds", "score_seconds", "update_seconds")


def main() -> int:
    """Run all parts; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--kibibytes", type=int, nargs="*", default=[150, 1200, 2600], help="sizes of the full disks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), options.max_steps, random.Random(options.seed))
        alone = trial.run_alone()
        rows = [
            trial.stopped_often(alone, "SIGKILL", signal.SIGKILL, options.kills),
            trial.stopped_often(alone, "SIGTERM", signal.SIGTERM, options.terms),
            *(trial.full_disk(alone, size) for size in options.kibibytes),
        ]
    print(table(["stopped by", "stops", "before a checkpoint", "steps redone", "result"], rows))
    for problem in trial.problems:
        print("FAILED:", problem)
    return 1 if trial.problems else 0


class Trial:
    """Runs of one command in folders that are all called ``run``, since a delta's metadata names the folder."""

    def __init__(self, folder: Path, max_steps: int, generator: random.Random) -> None:
        self.folder, self.max_steps, self.random = folder, max_steps, generator
        self.seconds = 0.0
        self.problems: list[str] = []

    def words(self, run: Path) -> list[str]:
        """Return the command; it resumes when the run has a checkpoint."""
        flags = f"--max-steps {self.max_steps} --save-steps 2 --questions-per-step 1 --num-generations 2".split()
        flags += ["--max-new-tokens", "32", "--log-masks-every", "1", "--logging-steps", "1"]
        resume = ["--resume-from-checkpoint", "latest"] if checkpoints(run) else []
        return [sys.executable, "-m", "ssrctl", "train", "-o", str(run), *flags, *resume]

    def start(self, run: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(self.words(run), stderr=subprocess.PIPE, text=True, env=environment)

    def run_alone(self) -> Path:
        run = self.folder / "alone" / "run"
        began = time.monotonic()
        process = self.start(run)
        _, err = process.communicate()
        self.seconds = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"the run that was left alone failed: {err}")
        return run

    def stopped_often(self, alone: Path, name: str, number: signal.Signals, stops: int) -> list[str]:
        """Stop a run at random moments, and once more whenever it finished before it was stopped often enough."""
        run, done, early, redone = self.folder / name / "run", 0, 0, 0
        while done < stops:
            if done and len(steps(run)) >= self.max_steps:
                self.compare(alone, run, name)
                shutil.rmtree(run)
            process = self.start(run)
            try:
                _, err = process.communicate(timeout=self.random.uniform(0, 1.1) * self.seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                _, err = process.communicate()
            if process.returncode == 0:
                continue
            done += 1
            early += not checkpoints(run)
            if number == signal.SIGTERM:
                # before Python has installed the handler, there is nothing to keep
                if process.returncode != 3 and not (process.returncode == -signal.SIGTERM and not err):
                    self.problems.append(f"{name}: exit code {process.returncode}: {err[-300:]}")
                self.check_text(name, err)
                if run.exists() and checkpoints(run) and len(steps(run)) != int(checkpoints(run)[-1].name):
                    self.problems.append(f"{name}: {len(steps(run))} steps, newest checkpoint {checkpoints(run)[-1]}")
                self.check_files(name, run)
            redone += max(0, len(steps(run)) - (int(checkpoints(run)[-1].name) if checkpoints(run) else 0))
            if checkpoints(run) and len(steps(run)) < int(last(run).name):
                self.problems.append(f"{name}: {len(steps(run))} rows of metrics at checkpoint {last(run).name}")
        self.finish(alone, run, name)
        return [name, str(done), str(early), str(redone), "as left alone"]

    def full_disk(self, alone: Path, size: int) -> list[str]:
        """Run on a tmpfs of ``size`` KiB; when it is full, enlarge it and continue."""
        name = f"disk of {size} KiB"
        mount = self.folder / f"disk{size}"
        mount.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], capture_output=True, text=True
        )
        if made.returncode:
            return [name, "0", "", "", f"skipped: no tmpfs can be mounted ({made.stderr.strip()})"]
        try:
            run = mount / "run"
            process = self.start(run)
            _, err = process.communicate()
            stops = int(process.returncode != 0)
            if process.returncode not in (0, 2):
                self.problems.append(f"{name}: exit code {process.returncode}: {err[-300:]}")
            if stops and "No space left on device" not in err:
                self.problems.append(f"{name}: does not say that the disk is full: {err[-300:]}")
            self.check_text(name, err)
            self.check_files(name, run)
            early = int(not checkpoints(run))
            subprocess.run(["mount", "-o", "remount,size=1g", str(mount)], check=True)
            self.finish(alone, run, name)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        return [name, str(stops), str(early), "", "as left alone" if stops else "large enough"]

    def finish(self, alone: Path, run: Path, name: str) -> None:
        if len(steps(run)) < self.max_steps or not checkpoints(run) or checkpoints(run)[-1].name != last(alone).name:
            process = self.start(run)
            _, err = process.communicate()
            if process.returncode:
                self.problems.append(f"{name}: cannot be continued: {err[-500:]}")
                return
        self.compare(alone, run, name)

    def compare(self, alone: Path, run: Path, name: str) -> None:
        for file in ("delta.safetensors", "optimizer.safetensors", "state.json"):
            if (last(run) / file).read_bytes() != (last(alone) / file).read_bytes():
                self.problems.append(f"{name}: {file} differs from that of the run that was left alone")
        if steps(run) != steps(alone):
            self.problems.append(f"{name}: metrics differ from those of the run that was left alone")
        for place in ("rollouts", "masks"):
            ours, theirs = ({p.name: p.read_bytes() for p in (one / place).iterdir()} for one in (run, alone))
            if ours != theirs:
                self.problems.append(f"{name}: {place} differ from those of the run that was left alone")
        self.check_files(name, run)

    def check_text(self, name: str, err: str) -> None:
        lines = [line for line in err.splitlines() if line.startswith(("error:", "stopped:", "  fix:"))]
        if "Traceback" in err or len(lines) > 2:
            self.problems.append(f"{name}: more than a line and its remedy: {err[-500:]}")

    def check_files(self, name: str, run: Path) -> None:
        """Check that nothing torn is left; not after SIGKILL, whose leftovers go at the next start."""
        if not run.exists():
            return
        torn = [str(p.relative_to(run)) for p in run.rglob("*") if p.name.endswith(".part") or p.name == ".lock"]
        torn += [p.name for p in (run / "checkpoints").glob("*") if not (p / "COMPLETE").is_file()]
        if torn:
            self.problems.append(f"{name}: left behind: {', '.join(torn)}")


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob("*/COMPLETE"))


def last(run: Path) -> Path:
    """Return the newest complete checkpoint."""
    return checkpoints(run)[-1]


def steps(run: Path) -> list[dict[str, object]]:
    """Return the rows of metrics without times; a truncated last line is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
