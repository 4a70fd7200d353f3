"""What the study measures of a run's gradients and weights, next to its accuracy; each returns numbers by name."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssrctl import Rollout, read_rollouts
from ssrctl.checkpoints.delta import DeltaFile, apply_delta
from ssrctl.checkpoints.run_dir import find_delta
from ssrctl.configs import DiagnoseConfig, EvalConfig, ModelConfig
from ssrctl.evaluation.step_patterns import FormatDiversity
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.io.problems import IN_DISTRIBUTION
from ssrctl.models.loading import load_model
from ssrctl.stages import diagnose
from ssrctl.stages import eval as evaluation

from .tasks import EQUAL, FORMATS, NUM_SAMPLES, Task, format_of

Settings = Mapping[str, Any]
# Probes: problems of each kind, and tokens; eight operations and the answer have 72.
PROBES, PROBE_TOKENS = 256, 80


def steps(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Measure the step gradients of a run with mask logs, before masking.

    Returns:
        ``cosine_alike`` and ``cosine_opposite``, the mean cosine of pairs of operations whose numbers are both odd or both
        even, and of the other pairs; ``conflict_...``: the share of sum |a b| with opposite signs; ``top_conflict_...``:
        the share of coordinates with opposite signs among those that either ranks highest; ``energy``: for each
        operation, the share of its gradient's squared norm in its own set over that in the set that it would have taken
        without claims; ``reward``: the mean reward of each operation in the last training step, -0.5 for a wrong sign.
    """
    found: dict[str, list[float]] = defaultdict(list)
    energy: dict[int, list[float]] = defaultdict(list)
    for path in mask_log_paths(folder):
        for question in load_mask_log(path).questions:
            places = {unit.steps[0]: place for place, unit in enumerate(question.units)}
            places = {step: place for step, place in places.items() if step < task.operations}
            for step, place in places.items():
                unit = question.units[place]
                if unit.captured is not None and unit.unconstrained_captured:
                    energy[step].append(unit.captured / unit.unconstrained_captured)
            for i, j in ((i, j) for i in places for j in places if i < j):
                name = "alike" if (j - i) % 2 == 0 else "opposite"
                a, b = places[i], places[j]
                assert question.gradient_cosine is not None
                assert question.conflict is not None
                found[f"cosine_{name}"].append(question.gradient_cosine[a][b])
                for kind in ("weighted_conflict", "top_conflict"):
                    if (value := question.conflict[kind][a][b]) is not None:
                        found[f"{kind}_{name}"].append(value)
    rollouts = list(read_rollouts(max((folder / "rollouts").glob("*.jsonl"))))
    scores = [
        [one.scores[step] for one in rollouts if one.scores and step < len(one.scores)] for step in sorted(energy)
    ]
    return {name: statistics.fmean(values) for name, values in found.items()} | {
        "energy": [statistics.fmean(energy[step]) for step in sorted(energy)],
        "reward": [statistics.fmean(one.reward for one in mine if one.reward is not None) for mine in scores],
    }


def weights(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Measure what a run did to the weights, and its agreement with ``other``, a run with another seed.

    Returns:
        Figures of ``ssrctl diagnose`` under its names (docs/metrics.md), of the changed weights bit for bit.
    """
    numbers = _diagnose([Path(task.model), folder], "sparsity,rank,spectrum,landing")
    total, landing = numbers["total"], numbers["landing"]["total"]
    found = {name: total[name] for name in ("sparsity", "sparsity_bf16", "bit_equal_frac", "relative_l2")}
    found |= {name: numbers["rank"]["total"][name] for name in ("rank_frac", "effective_rank_frac", "rounding_ratio")}
    spectrum = numbers["spectrum"]["total"]
    found |= {name: spectrum[name] for name in ("left_mean", "gaussian_left_mean", "shift_mean", "expected_shift_mean")}
    found |= {f"{name}_ratio": landing[name]["ratio"] for name in ("principal", "principal_same_size", "low_magnitude")}
    if other is not None:
        overlap = _diagnose([Path(task.model), other, folder], "overlap")["overlap"]["total"]
        names = ("one_sided", "jaccard", "expected_jaccard", "expected_jaccard_same_size")
        found |= {name: overlap[name] for name in names}
    return found


def same(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Return the share of weights of two runs of one start model that agree within 1e-5 and 1e-4 (Mukherjee et al. sec. 4).

    ``untrained_within_...`` is that of the start model and the other run: equality is cheap where little has moved.
    """
    assert other is not None
    base, mine, full = (_loaded(task.model, run) for run in (None, folder, other))
    apart = torch.cat([(mine[name] - full[name]).abs().flatten() for name in mine])
    moved = torch.cat([(base[name] - full[name]).abs().flatten() for name in mine])
    found = {f"within_{bound:g}": (apart <= bound).double().mean().item() for bound in (1e-5, 1e-4)}
    found |= {f"untrained_within_{bound:g}": (moved <= bound).double().mean().item() for bound in (1e-5, 1e-4)}
    return found | {"distance_over_update": (apart.norm() / moved.norm()).item()}


def places(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Return the Jaccard index of the weights that two runs changed, by their places only, and that of chance per tensor.

    Unlike ``weights`` it takes runs from different start models of the same shapes.
    """
    assert other is not None
    one, two = (DeltaFile(find_delta(run)) for run in (folder, other))
    both = sizes = 0
    chance = 0.0
    for name, shape in one.shapes.items():
        mine, theirs = (set(_indices(delta, name)) for delta in (one, two))
        both += len(mine & theirs)
        sizes += len(mine) + len(theirs)
        chance += len(mine) * len(theirs) / torch.Size(shape).numel()
    return {"jaccard": both / (sizes - both), "expected_jaccard": chance / (sizes - chance)}


def signs(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Return the means over a run of what ``--log-signs-every`` logs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("negative_energy_frac", "negative_coordinate_frac", "sign_cosine")
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def formats(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Measure the formats of a run's test responses on the task ``formats``.

    Returns:
        ``entropy`` in bits, ``distinct`` and ``largest``, the share of the most frequent one, ``largest_equal`` that among
        ``EQUAL`` alone; of each format of the warm-up its share by its name and, where it occurs, the share of its answers
        that are right (``right_...``).
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for one in read_rollouts(folder / "eval" / "samples.jsonl", needs=("final",)):
        found[format_of(one.response or "")].append(bool(one.final and one.final.correct))
    diversity = FormatDiversity.of([name for name, finals in found.items() for _ in finals])
    equal = [len(found.get(name, ())) for name in EQUAL]
    return (
        {"entropy": diversity.entropy, "distinct": diversity.distinct, "largest": diversity.largest_frac}
        | {"largest_equal": max(equal) / max(1, sum(equal))}
        | {name: len(found.get(name, ())) / diversity.num_responses for name in FORMATS}
        | {f"right_{name}": statistics.fmean(found[name]) for name in FORMATS if name in found}
    )


def probes(task: Task, folder: Path, other: Path | None, settings: Settings) -> dict[str, Any]:
    """Return accuracies of ``tiny-arithmetic:probes`` by category, and those out of distribution minus that within."""
    found: dict[str, list[bool]] = defaultdict(list)
    settings = {**settings, "max_new_tokens": PROBE_TOKENS}
    for one in sampled(task, folder, "tiny-arithmetic:probes", folder / "probes", settings, PROBES):
        found[one.extra["category"]].append(bool(one.final and one.final.correct))
    means = {name: statistics.fmean(finals) for name, finals in found.items()}
    return means | {
        f"{name}_apart": mean - means[IN_DISTRIBUTION] for name, mean in means.items() if name != IN_DISTRIBUTION
    }


def sampled(
    task: Task, folder: Path, dataset: str, output: Path, settings: Settings, limit: int | None = None
) -> list[Rollout]:
    """Sample answers of the run in ``folder``, of the start model for a run without steps, and return them."""
    evaluation.run(
        EvalConfig(
            model=task.model,
            checkpoint=folder if settings["max_steps"] else None,
            dataset=dataset,
            limit=limit,
            prompt_template=settings["prompt_template"],
            max_new_tokens=settings["max_new_tokens"],
            num_samples=NUM_SAMPLES,
            sampling_batch_size=settings.get("sampling_batch_size", 512),
            seed=settings["seed"],
            dtype=settings.get("dtype", "auto"),
            output_dir=output,
            report=False,
            json=True,
        )
    )
    return list(read_rollouts(output / "samples.jsonl", needs=("final",)))


MEASURES: dict[str, Callable[[Task, Path, Path | None, Settings], dict[str, Any]]] = {
    "steps": steps,
    "weights": weights,
    "same": same,
    "places": places,
    "signs": signs,
    "formats": formats,
    "probes": probes,
}


def _diagnose(paths: list[Path], measures: str) -> dict[str, Any]:
    output = paths[-1] / "diagnose"
    return diagnose.run(DiagnoseConfig(paths=paths, measures=measures, output_dir=output, json=True, num_workers=1))


def _indices(delta: DeltaFile, name: str) -> Iterable[int]:
    return (int(index) for indices, _ in delta.blocks(name) for index in indices)


def _loaded(model: str, run: Path | None) -> dict[str, torch.Tensor]:
    """Return the weights of a start model, or of a run from it, in float32."""
    loaded = load_model(ModelConfig(model=model, device="cpu", dtype="bfloat16"))
    named = dict(loaded.model.named_parameters())
    if run is not None:
        apply_delta(DeltaFile(find_delta(run)), named, loaded.identity.fingerprint)
    return {name: parameter.detach().float() for name, parameter in named.items()}
