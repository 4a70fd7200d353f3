"""Time of a whole training step (rollouts, scores, updates) of Kronos with few units, against a dense step.

Both train the bundled reasoner with the same questions and settings; rounds alternate, so that other
work on the machine affects both.

    python benchmarks/training_step.py [--max-units 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import goal, machine, table

from ssrctl.configs import TrainConfig
from ssrctl.stages import train

PARTS = ("sample_seconds", "score_seconds", "update_seconds")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--max-units", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=6, help="training steps a round; the first is left out")
    given = options.parse_args()
    print(machine())
    kinds = {
        "adamw": {"optimizer": "adamw"},
        f"kronos, --max-units {given.max_units}": {"optimizer": "kronos", "max_units": given.max_units},
        "kronos": {"optimizer": "kronos"},
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for name, settings in kinds.items():
                run = Path(folder) / f"{number}-{name}"
                train.run(TrainConfig(output_dir=run, max_steps=given.steps, save_steps=10**6, **settings))
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                seconds[name] += [[row[part] for part in PARTS] for row in rows[1:]]
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()}
    whole = {name: statistics.median(sum(row) for row in rows) for name, rows in seconds.items()}
    cells = [
        [n, *(f"{v:.3f}" for v in middle[n]), f"{whole[n]:.3f}", f"{whole[n] / whole['adamw']:.2f}"] for n in kinds
    ]
    print(table(["optimizer", "sample, s", "score, s", "update, s", "step, s", "dense steps"], cells))
    print()
    few = f"kronos, --max-units {given.max_units}"
    goal(f"{few}: a training step in dense ones", whole[few] / whole["adamw"], at_most=1.5)


if __name__ == "__main__":
    main()
