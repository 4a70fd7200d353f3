"""An evaluation's results in the form of lm-evaluation-harness, for the scripts that read its ``results_*.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssrctl.evaluation.accuracy import per_problem, with_reference
from ssrctl.io.records import Rollout


def lm_eval_results(
    summary: Mapping[str, Any], samples: Sequence[Rollout], *, dataset: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results of one task: accuracy as ``exact_match``, pass@k and maj@n where problems have several samples.

    Args:
        summary: of ``accuracy.summarise``, with the model's facts.
        samples: those that it summarises.
        dataset: the data set, or the file of given responses; its name without folder and suffix is the task's.
        settings: of sampling, for ``gen_kwargs``; empty for given responses.
    """
    if Path(dataset).is_absolute() or Path(dataset).exists():
        dataset = Path(dataset).name  # of a file, no path of this machine
    task = Path(dataset).name.split(".")[0] or "responses"
    shares = list(per_problem(with_reference(samples)).values())
    metrics: dict[str, Any] = {"exact_match": summary["accuracy"]["value"]}
    repeats = summary["maj_at_n"]["n"]
    if repeats > 1:
        metrics |= {f"pass@{k}": value for k, value in summary["pass_at_k"].items() if k != "1"}
        metrics[f"maj@{repeats}"] = summary["maj_at_n"]["value"]
    # the error of the mean over problems, which the harness has for one sample per problem
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else "N/A"
    model = summary.get("model") or {}
    return {
        "results": {
            task: {"alias": task, **{f"{name},none": value for name, value in metrics.items()}}
            | {"exact_match_stderr,none": error}
        },
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "dataset_path": dataset,
                "output_type": "generate_until",
                "repeats": repeats,
                "num_fewshot": 0,
                "generation_kwargs": dict(settings),
            }
        },
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(metrics, True)},
        "n-samples": {task: {"original": len(shares), "effective": len(shares)}},
        "config": {"model": "hf", "model_args": f"pretrained={model.get('name')}", "gen_kwargs": dict(settings)},
        "model_name": model.get("name"),
        "model_source": "hf",
    }
