"""Files that a run needs besides its task, made once per task: masks of weights, and models with rotated heads."""

from __future__ import annotations

import json
from pathlib import Path

from ssrctl.configs import (
    DiagnoseConfig,
    MaskComplementConfig,
    MaskLowMagnitudeConfig,
    MaskPrincipalConfig,
    MaskRandomConfig,
    MaskUnionConfig,
    SuperweightsConfig,
)
from ssrctl.stages import diagnose, mask, superweights

from .tasks import Task

LINEAR = ["*proj.weight"]  # the matrices that Zhu et al. take masks from


def mask_file(name: str, task: Task, seed: int) -> Path:
    """Return a mask of the task's start model by its name, and make it if it is not there.

    ``superweights``: 0.5% by gradient (SSR section 2.2); ``random``: 1% of each tensor, another with each seed;
    ``principal``, ``non-principal``, ``low-magnitude``: half of the linear layers; ``safe``: either of the last two.
    """
    path = task.folder / "masks" / (f"random-{seed}.safetensors" if name == "random" else f"{name}.safetensors")
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    if name == "superweights":
        superweights.run(SuperweightsConfig(model=task.model, **_prompts(task), output=path, json=True))
    elif name == "random":
        mask.run_random(MaskRandomConfig(model=task.model, density=0.01, seed=seed, output=path, json=True))
    elif name == "principal":
        mask.run_principal(MaskPrincipalConfig(model=task.model, include=LINEAR, output=path, json=True))
    elif name == "low-magnitude":
        mask.run_low_magnitude(MaskLowMagnitudeConfig(model=task.model, include=LINEAR, output=path, json=True))
    elif name == "non-principal":
        principal = mask_file("principal", task, seed)
        mask.run_complement(MaskComplementConfig(mask=principal, within=True, output=path, json=True))
    elif name == "safe":
        both = [mask_file(part, task, seed) for part in ("non-principal", "low-magnitude")]
        mask.run_union(MaskUnionConfig(masks=both, output=path, json=True))
    else:
        raise ValueError(f"no mask is called {name}")
    return path


def rotated(task: Task) -> str:
    """Return the folder of a model with the start model's function, whose attention heads are rotated (Zhu et al.)."""
    folder = task.folder / "rotated"
    if not folder.exists():
        diagnose.run(DiagnoseConfig(paths=[Path(task.model)], intervene="rotate", output_dir=folder, json=True))
    return str(folder)


def _prompts(task: Task) -> dict[str, str]:
    """Write 48 worked solutions as texts whose loss gives the superweights; the last third is held out.

    A task of a pretrained model has no solutions, and its superweights come from the prompts of ``ssrctl superweights``.
    """
    path = task.folder / "prompts.jsonl"
    with (task.folder / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(48)]
    if "solution" not in rows[0]:
        return {}
    texts = [f"<bos>{row['question']}\n{row['solution']}<eos>" for row in rows]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"prompts": str(path)}
