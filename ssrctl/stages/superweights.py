"""`ssrctl superweights`: find the language-critical weights of a model and write them as a mask (SSR section 2.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ssrctl.configs import TINY, SuperweightsConfig
from ssrctl.core.budget import coordinates
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.core.unions import Indices, combinations, random_coordinates, sizes_below, unite
from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_mask
from ssrctl.io.console import console, note, progress, show_plan, warn
from ssrctl.io.files import write_text
from ssrctl.io.manifest import file_hash, published_settings, versions
from ssrctl.io.package_data import profile_path
from ssrctl.io.prompt_sets import load_prompt_set
from ssrctl.masks.spikes import Spike, strongest_channels
from ssrctl.masks.superweights import (
    AblationProbe,
    Divergence,
    TokenisedPrompts,
    collect_candidates,
    largest_weights,
    split_subsets,
    tokenise_prompts,
)
from ssrctl.models.loading import LoadedModel, describe_model, load_model

DEFAULT_FRACTION = 0.005
FIRST_MINIMAL_FRACTION = 0.04
TOO_FEW = 0.001  # the paper protects 0.5%, and saw language degrade with 0.25%


@dataclass
class _Work:
    """What the steps of one discovery share."""

    config: SuperweightsConfig
    loaded: LoadedModel
    gradient: TokenisedPrompts
    heldout: TokenisedPrompts
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def fractions(self) -> list[float]:
        """Mask sizes to try, largest first; fractions of all weights."""
        if self.config.method == "activation":
            return []
        if self.config.minimal:
            return sizes_below(FIRST_MINIMAL_FRACTION, self.loaded.num_parameters)
        return [DEFAULT_FRACTION if self.config.fraction is None else self.config.fraction]

    @property
    def subsets(self) -> list[list[int]]:
        """Which gradient prompts are in which subset."""
        seed = derive_seed(self.config.seed, "superweights", "subsets")
        return split_subsets(len(self.gradient.ids), self.config.num_subsets, seed)

    def size(self, fraction: float) -> int:
        return coordinates(fraction, self.loaded.num_parameters)


def run(config: SuperweightsConfig) -> dict[str, Any]:
    """Find the superweights, write the mask and, beside it, the report; returns the report.

    With ``--dry-run`` the model is loaded, the plan printed and returned, and nothing is written.

    Raises:
        UserError: see ``load_prompt_set``, ``tokenise_prompts`` and ``load_model``; a size of no weight at all, or
            above the number of candidates; no activation spike with ``--method activation``.
    """
    note(describe_model(config))
    if config.output.is_dir():
        raise UserError(f"cannot write {config.output}: it is a folder", "name a file")
    path = _prompts_path(config)
    prompts = load_prompt_set(path)
    work = _prepare(
        config, [p.text for p in prompts if p.split == "gradient"], [p.text for p in prompts if p.split == "heldout"]
    )
    plan = _plan(work, path)
    if config.dry_run:
        show_plan("superweights", plan)
        return plan
    selected = _discover(work)
    mask = BlockMask.from_indices(work.loaded.shapes(), selected)
    settings = published_settings(config) | {"prompts_file": path.name, "prompts_hash": file_hash(path)}
    settings |= {"versions": versions()}
    report = {
        "format": "ssrctl-superweights-report",
        "version": 1,
        "model": asdict(work.loaded.identity),
        "num_parameters": work.loaded.num_parameters,
        "prompts": _prompt_facts(work, path),
        "kl_threshold": config.kl_threshold,
        **work.report,
        "mask": {"file": config.output.name, "count": mask.count(), "fraction": mask.density()},
        "settings": settings,
    }
    save_mask(config.output, mask, mask_kind="superweights", model=work.loaded.identity, settings=settings)
    report_path = config.output.with_name(config.output.stem + ".report.json")
    write_text(report_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    _show(report)
    size = f"{mask.count()} weights, {_percent(mask.density())}"
    note(f"wrote {config.output}: {size}; {report_path.name} beside it")
    return report


# --------------------------------------------------------------------------------------------------
# before anything is computed


def _prompts_path(config: SuperweightsConfig) -> Path:
    if config.prompts != "auto":
        return profile_path("prompts", config.prompts, ".jsonl")
    name = TINY if config.model == TINY else "general"
    note(f"prompts: {name} (give --prompts for your own)")
    return profile_path("prompts", name, ".jsonl")


def _prepare(config: SuperweightsConfig, gradient: Sequence[str], heldout: Sequence[str]) -> _Work:
    loaded = load_model(config, bytes_per_parameter=_bytes_per_parameter(config))
    longest = min(config.max_prompt_tokens, loaded.context_length or config.max_prompt_tokens)
    tokenised = tokenise_prompts(loaded.tokenizer, [*gradient, *heldout], longest)
    first, rest = tokenised.ids[: len(gradient)], tokenised.ids[len(gradient) :]
    work = _Work(config, loaded, TokenisedPrompts(first, tokenised.num_cut_tokens), TokenisedPrompts(rest, 0))
    if tokenised.num_cut_tokens:
        warn(f"{tokenised.num_cut_tokens} tokens beyond {longest} per prompt were cut off (--max-prompt-tokens)")
    if len(work.subsets) < config.num_subsets:
        warn(f"{len(gradient)} gradient prompts make {len(work.subsets)} subsets, not {config.num_subsets}")
    for fraction in work.fractions[:1]:
        if work.size(fraction) == 0:
            raise UserError(
                f"{fraction:.4%} of {loaded.num_parameters} weights is less than one weight", "raise --fraction"
            )
        if fraction > config.candidate_fraction:
            raise UserError(
                f"a mask of {fraction:.2%} cannot be cut from candidates of {config.candidate_fraction:.2%} per subset",
                "raise --candidate-fraction or lower --fraction",
            )
    return work


def _bytes_per_parameter(config: SuperweightsConfig) -> float:
    """Beside the weights: one gradient, and the candidates of every subset as bits and as scored indices."""
    if config.method == "activation":
        return _gradient_bytes(config)
    kept = FIRST_MINIMAL_FRACTION if config.minimal else config.fraction or DEFAULT_FRACTION
    return _gradient_bytes(config) + config.num_subsets * (1 / 8 + 12 * kept)


def _gradient_bytes(config: SuperweightsConfig) -> int:
    return 2 if config.dtype in ("bfloat16", "float16") else 4


def _plan(work: _Work, path: Path) -> dict[str, Any]:
    config, loaded = work.config, work.loaded
    num_prompts = len(work.gradient.ids)
    unions = combinations(len(work.subsets)) if work.fractions else []
    # The reference, each union, and at each size the set (beyond the first) and two controls.
    ablations = 1 + len(unions) + (3 * len(work.fractions) - 1 if work.fractions else 3)
    spikes = (
        "" if config.method == "gradient" else f" and up to one per layer for the spikes, {num_prompts} to find them"
    )
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    itemsize = loaded.model.dtype.itemsize
    memory = loaded.num_parameters * (itemsize + _bytes_per_parameter(config))
    memory += work.heldout.num_tokens * vocabulary * itemsize
    size = f"{work.fractions[0]:.3%}" if work.fractions else "the spikes found"
    return {
        "parameters": loaded.num_parameters,
        "method": config.method,
        "mask_size": f"{size}, shrunk while KL >= {config.kl_threshold}" if config.minimal else size,
        "prompts": f"{path.name}: {num_prompts} for gradients, {len(work.heldout.ids)} held out",
        "tokens": f"{work.gradient.num_tokens} for gradients, {work.heldout.num_tokens} held out",
        "prompt_subsets": len(work.subsets),
        "unions": len(unions),
        "backward_passes": num_prompts,
        "forward_passes": f"at most {ablations} over the {len(work.heldout.ids)} held-out prompts{spikes}",
        "memory": f"about {memory / 2**30:.2f} GiB",
        "output": str(config.output),
    }


def _prompt_facts(work: _Work, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "num_gradient": len(work.gradient.ids),
        "num_heldout": len(work.heldout.ids),
        "num_gradient_tokens": work.gradient.num_tokens,
        "num_heldout_tokens": work.heldout.num_tokens,
        "num_cut_tokens": work.gradient.num_cut_tokens,
        "subsets": work.subsets,
    }


# --------------------------------------------------------------------------------------------------
# the discovery


def _discover(work: _Work) -> Indices:
    """Run what ``--method`` asks for; fills ``work.report`` and returns the mask's flat indices by tensor."""
    with progress(unit="prompts") as bar:
        spikes = [] if work.config.method == "gradient" else _find_spikes(work, bar)
        task = bar.add_task("gradients", total=len(work.gradient.ids), status="")
        largest = work.size(work.fractions[0]) if work.fractions else 0
        members = work.size(work.config.candidate_fraction) if work.fractions else 1
        found = collect_candidates(
            work.loaded.model,
            [[work.gradient.ids[place] for place in subset] for subset in work.subsets],
            num_members=members,
            keep=largest,
            watched=[(spike.parameter, spike.index) for spike in spikes],
            tick=lambda: bar.advance(task),
        )
    with progress(unit="ablations") as bar:
        task = bar.add_task("ablations", total=None, status="")
        probe = AblationProbe(work.loaded.model, work.heldout.ids, lambda: bar.advance(task))
        selected: Indices = {}
        if work.fractions:
            selected = _shrink(work, probe, _best_union(work, probe, found.candidates))
        if work.config.method != "gradient":
            work.report["spikes"] = [
                _spike_facts(spike, ranks, probe) for spike, ranks in zip(spikes, found.ranks, strict=True)
            ]
            selected = _joined(work, selected, spikes)
            work.report["final"] = _beside_controls(work, probe, selected)
    return selected


def _find_spikes(work: _Work, bar: Progress) -> list[Spike]:
    task = bar.add_task("activations", total=len(work.gradient.ids), status="")
    layers = strongest_channels(work.loaded.model, work.gradient.ids, lambda: bar.advance(task))
    threshold = work.config.spike_threshold
    spikes = [layer for layer in layers if layer.ratio > threshold]
    highest = max(layers, key=lambda layer: layer.ratio)
    work.report["largest_spike_ratio"] = highest.ratio if math.isfinite(highest.ratio) else None
    if not spikes:
        message = (
            f"no activation spike above {threshold:g} times the median channel in {len(layers)} down projections; "
            f"the largest is {highest.ratio:.1f} times, in {highest.parameter}"
        )
        if work.config.method == "activation":
            raise UserError(message, "lower --spike-threshold or use --method gradient")
        warn(message)
    return spikes


def _best_union(work: _Work, probe: AblationProbe, candidates: Sequence[Any]) -> Sequence[Any]:
    """The candidate sets whose union, cut to the largest size wanted, gives the largest KL (eq. 1).

    All unions are compared at that one size: uncut, the union of everything is the largest set and would win
    by its size alone. Equal values go to the union of fewer subsets.
    """
    size = work.size(work.fractions[0])
    rows: list[dict[str, Any]] = []
    best: tuple[float, tuple[int, ...]] | None = None
    for chosen in combinations(len(candidates)):
        sets = [candidates[place] for place in chosen]
        whole = sets[0].members
        for other in sets[1:]:
            whole = whole | other.members
        cut = unite(sets, size)
        if (found := _count(cut)) < size:
            raise UserError(
                f"the prompts of subsets {list(chosen)} give only {found} weights a gradient that is not 0, "
                f"{size} are wanted",
                "lower --fraction or give longer or other prompts with --prompts FILE",
            )
        divergence = probe.measure(cut)
        rows.append({"subsets": list(chosen), "count_before": whole.count(), "count": size} | divergence.to_dict())
        if best is None or divergence.masked_reference > best[0]:
            best = divergence.masked_reference, chosen
    assert best is not None
    work.report |= {"unions": rows, "chosen_union": list(best[1])}
    return [candidates[place] for place in best[1]]


def _shrink(work: _Work, probe: AblationProbe, candidates: Sequence[Any]) -> Indices:
    """Go down the sizes while the divergence stays at the threshold; returns the smallest set that has it.

    With one size (no ``--minimal``) that one is returned whatever its divergence.
    """
    rows: list[dict[str, Any]] = []
    selected: Indices = {}
    for fraction in work.fractions:
        indices = unite(candidates, work.size(fraction))
        row = _beside_controls(work, probe, indices)
        # A divergence without bound (no distribution left at all) is stored as null and is above any threshold.
        kl = row["superweights"]["kl_masked_reference"]
        row["critical"] = kl is None or kl >= work.config.kl_threshold
        rows.append(row)
        if row["critical"] or not selected:
            selected = indices
        if not row["critical"]:
            break
    work.report |= {"sizes": rows, "reached_threshold": rows[0]["critical"]}
    if not rows[0]["critical"]:
        kl = rows[0]["superweights"]["kl_masked_reference"]
        warn(
            f"zeroing {rows[0]['fraction']:.3%} of the weights gives KL {kl:.3f}, below --kl-threshold "
            f"{work.config.kl_threshold:g}; this size was kept"
        )
    elif work.config.minimal and _count(selected) < TOO_FEW * work.loaded.num_parameters:
        warn(
            f"zeroing {_count(selected)} weights is already enough for KL {work.config.kl_threshold:g}: this minimal set "
            "says which weights matter most, it protects little else (--fraction sets the size)"
        )
    return selected


def _beside_controls(work: _Work, probe: AblationProbe, indices: Indices) -> dict[str, Any]:
    """The divergence of a set beside those of as many random coordinates and of the largest weights."""
    size = _count(indices)
    seed = derive_seed(work.config.seed, "superweights", "random control", size)
    controls: dict[str, Mapping[str, Tensor]] = {
        "superweights": indices,
        "random": random_coordinates(work.loaded.shapes(), size, seed),
        "largest_weight": largest_weights(work.loaded.model, size),
    }
    measured: dict[str, Divergence] = {name: probe.measure(chosen) for name, chosen in controls.items()}
    return {"fraction": size / work.loaded.num_parameters, "count": size} | {
        name: divergence.to_dict() for name, divergence in measured.items()
    }


def _joined(work: _Work, selected: Indices, spikes: Sequence[Spike]) -> Indices:
    shapes = work.loaded.shapes()
    mask = BlockMask.from_indices(shapes, selected)
    for spike in spikes:
        mask = mask | BlockMask.from_indices(shapes, {spike.parameter: torch.tensor([spike.index])})
    return mask.to_indices()


def _spike_facts(spike: Spike, ranks: list[float], probe: AblationProbe) -> dict[str, Any]:
    facts = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(spike).items()
    }
    alone = probe.measure({spike.parameter: torch.tensor([spike.index])})
    return facts | {"gradient_rank_fracs": ranks} | alone.to_dict()


def _count(indices: Mapping[str, Tensor]) -> int:
    return sum(part.numel() for part in indices.values())


# --------------------------------------------------------------------------------------------------
# what the user sees


def _show(report: Mapping[str, Any]) -> None:
    from rich.table import Table

    labelled = [("by gradient", row) for row in report.get("sizes", [])]
    if "final" in report:
        labelled.append(("with spikes" if labelled else "spikes", report["final"]))
    table = Table(title="KL in nats when set to zero: masked || reference, reference || masked", title_justify="left")
    for heading in ("set", "size", "weights", "superweights", "random", "largest |weight|"):
        table.add_column(heading, justify="right")
    for label, row in labelled:
        pairs = [_pair(row[name]) for name in ("superweights", "random", "largest_weight")]
        table.add_row(label, _percent(row["fraction"]), str(row["count"]), *pairs)
    console().print(table)
    if report.get("spikes"):
        table = Table(title="activation spikes, each weight set to zero alone", title_justify="left")
        for heading in ("weight", "value", "input, output over median", "gradient rank from the top", "KL"):
            table.add_column(heading, overflow="fold")
        for spike in report["spikes"]:
            where = f"{spike['parameter']} [{spike['out_channel']}, {spike['in_channel']}]"
            ratios = f"{_number(spike['input_ratio'], 0)}, {_number(spike['output_ratio'], 0)}"
            ranks = f"{_percent(min(spike['gradient_rank_fracs']))} to {_percent(max(spike['gradient_rank_fracs']))}"
            table.add_row(where, f"{spike['weight']:.3f}", ratios, ranks, _pair(spike))
        console().print(table)
    last = labelled[-1][1]["random"]["kl_masked_reference"]
    if last is None or last >= report["kl_threshold"]:
        note(
            f"as many random weights also give KL {_number(last, 2)}, so reaching {report['kl_threshold']:g} "
            "proves little at this size: compare the columns"
        )


def _pair(row: Mapping[str, Any]) -> str:
    return f"{_number(row['kl_masked_reference'], 3)}, {_number(row['kl_reference_masked'], 3)}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _number(value: float | None, digits: int) -> str:
    return "unbounded" if value is None else f"{value:.{digits}f}"
