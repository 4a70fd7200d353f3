"""The search for superweights: candidates by gradient, unions, sizes, and activation spikes (SSR section 2.2)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ssrctl.configs import SuperweightsConfig
from ssrctl.core.budget import coordinates
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.core.unions import Candidates, Indices, combinations, random_coordinates, sizes_below, unite
from ssrctl.distributed.dividing import Spread
from ssrctl.errors import UserError
from ssrctl.io.console import progress, warn
from ssrctl.masks.spikes import Spike, strongest_channels
from ssrctl.masks.superweights import (
    AblationProbe,
    Divergence,
    SubsetCandidates,
    Tick,
    collect_candidates,
    largest_weights,
    no_tick,
    split_subsets,
)
from ssrctl.models.loading import LoadedModel
from ssrctl.text.prompt_tokens import TokenisedPrompts

DEFAULT_FRACTION = 0.005
FIRST_MINIMAL_FRACTION = 0.04
TOO_FEW = 0.001  # the paper protects 0.5%, and saw language degrade with 0.25%


@dataclass
class SuperweightSearch:
    """The inputs of one search, and the report that its steps fill.

    Attributes:
        config: the settings.
        loaded: the model.
        gradient: prompts for the gradients.
        heldout: prompts for the divergences.
        report: facts for the report file.
        tick: called after each pass in this process.
    """

    config: SuperweightsConfig
    loaded: LoadedModel
    gradient: TokenisedPrompts
    heldout: TokenisedPrompts
    report: dict[str, Any] = field(default_factory=dict)
    tick: Tick = no_tick

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
        """The gradient prompts (indices) of each subset."""
        seed = derive_seed(self.config.seed, "superweights", "subsets")
        return split_subsets(len(self.gradient.ids), self.config.num_subsets, seed)

    @cached_property
    def probe(self) -> AblationProbe:
        """The divergences from the model as it is."""
        return AblationProbe(self.loaded.model, self.heldout.ids, lambda: self.tick())

    def size(self, fraction: float) -> int:
        return coordinates(fraction, self.loaded.num_parameters)


@dataclass(frozen=True)
class SubsetPass:
    """The gradient of one prompt subset, a job of the search; see ``collect_candidates``."""

    subset: int
    num_members: int
    keep: int
    watched: list[tuple[str, int]]


Job = SubsetPass | Indices  # a gradient, or the divergence with these weights at 0
Measure = Callable[[Iterable[Indices]], Iterator[Divergence]]


def do_job(search: SuperweightSearch, job: Job) -> Iterator[Any]:
    """Yield the ``SubsetCandidates`` or the ``Divergence`` that a job asks for; any process gives the same."""
    if isinstance(job, SubsetPass):
        prompts = [search.gradient.ids[place] for place in search.subsets[job.subset]]
        yield collect_candidates(
            search.loaded.model,
            prompts,
            num_members=job.num_members,
            keep=job.keep,
            watched=job.watched,
            tick=search.tick,
        )
    else:
        yield search.probe.measure(job)


def find_superweights(search: SuperweightSearch, spread: Spread[Job, Any]) -> Indices:
    """Run the search of ``--method``, fill ``search.report``, and return the mask's flat indices by tensor.

    Gradients of the subsets and ablations are jobs (``do_job``); the search for spikes, a forward pass per prompt, is not
    divided.
    """
    with progress(unit="prompts") as bar:
        spikes = [] if search.config.method == "gradient" else _find_spikes(search, bar)
        task = bar.add_task("gradients", total=len(search.gradient.ids), status="")
        search.tick = lambda: bar.advance(task)
        largest = search.size(search.fractions[0]) if search.fractions else 0
        members = search.size(search.config.candidate_fraction) if search.fractions else 1
        watched = [(spike.parameter, spike.index) for spike in spikes]
        passes: list[SubsetCandidates] = []
        for found in spread(SubsetPass(n, members, largest, watched) for n in range(len(search.subsets))):
            passes.append(found)
            bar.update(task, completed=sum(map(len, search.subsets[: len(passes)])))
    with progress(unit="ablations") as bar:
        task = bar.add_task("ablations", total=None, status="")
        search.tick = lambda: bar.advance(task)
        selected: Indices = {}
        if search.fractions:
            selected = _shrink(search, spread, _best_union(search, spread, [one.candidates for one in passes]))
        if search.config.method != "gradient":
            alone = spread({spike.parameter: torch.tensor([spike.index])} for spike in spikes)
            search.report["spikes"] = [
                _spike_facts(spike, [one.ranks[place] for one in passes], divergence)
                for place, (spike, divergence) in enumerate(zip(spikes, alone, strict=True))
            ]
            selected = _joined(search, selected, spikes)
            search.report["final"] = _with_controls(search, spread, selected)
    return selected


def _find_spikes(search: SuperweightSearch, bar: Progress) -> list[Spike]:
    task = bar.add_task("activations", total=len(search.gradient.ids), status="")
    layers = strongest_channels(search.loaded.model, search.gradient.ids, lambda: bar.advance(task))
    threshold = search.config.spike_threshold
    spikes = [layer for layer in layers if layer.ratio > threshold]
    highest = max(layers, key=lambda layer: layer.ratio)
    search.report["largest_spike_ratio"] = highest.ratio if math.isfinite(highest.ratio) else None
    if not spikes:
        message = (
            f"no activation spike above {threshold:g} times the median channel in {len(layers)} down projections; "
            f"the largest is {highest.ratio:.1f} times, in {highest.parameter}"
        )
        if search.config.method == "activation":
            raise UserError(message, "lower --spike-threshold or use --method gradient")
        warn(message)
    return spikes


def _best_union(search: SuperweightSearch, measure: Measure, candidates: Sequence[Candidates]) -> Sequence[Candidates]:
    """Return the candidate sets whose union, cut to the largest size wanted, gives the largest KL (eq. 1).

    All unions are compared at that one size: uncut, the union of everything is the largest set and would win by its
    size. Equal values go to the union of fewer subsets.
    """
    size = search.size(search.fractions[0])
    rows: list[dict[str, Any]] = []
    best: tuple[float, tuple[int, ...]] | None = None
    unions = combinations(len(candidates))

    def cut(chosen: tuple[int, ...]) -> Indices:
        made = unite([candidates[place] for place in chosen], size)
        if (found := _count(made)) < size:
            raise UserError(
                f"the prompts of subsets {list(chosen)} give only {found} weights a gradient that is not 0, "
                f"{size} are wanted",
                "lower --fraction or give longer or other prompts with --prompts FILE",
            )
        return made

    for chosen, divergence in zip(unions, measure(map(cut, unions)), strict=True):
        whole = functools.reduce(operator.or_, (candidates[place].members for place in chosen))
        rows.append({"subsets": list(chosen), "count_before": whole.count(), "count": size} | divergence.to_dict())
        if best is None or divergence.masked_reference > best[0]:
            best = divergence.masked_reference, chosen
    assert best is not None
    search.report |= {"unions": rows, "chosen_union": list(best[1])}
    return [candidates[place] for place in best[1]]


def _shrink(search: SuperweightSearch, measure: Measure, candidates: Sequence[Candidates]) -> Indices:
    """Go down the sizes while the divergence reaches the threshold; return the smallest set that does.

    Without ``--minimal`` there is one size, which is returned whatever its divergence.
    """
    rows: list[dict[str, Any]] = []
    selected: Indices = {}
    for fraction in search.fractions:
        indices = unite(candidates, search.size(fraction))
        row = _with_controls(search, measure, indices)
        # An unbounded divergence (no distribution is left) is stored as null and is above any threshold.
        kl = row["superweights"]["kl_masked_reference"]
        row["critical"] = kl is None or kl >= search.config.kl_threshold
        rows.append(row)
        if row["critical"] or not selected:
            selected = indices
        if not row["critical"]:
            break
    search.report |= {"sizes": rows, "reached_threshold": rows[0]["critical"]}
    if not rows[0]["critical"]:
        kl = rows[0]["superweights"]["kl_masked_reference"]
        warn(
            f"zeroing {rows[0]['fraction']:.3%} of the weights gives KL {kl:.3f}, below --kl-threshold "
            f"{search.config.kl_threshold:g}; this size was kept"
        )
    elif search.config.minimal and _count(selected) < TOO_FEW * search.loaded.num_parameters:
        warn(
            f"zeroing {_count(selected)} weights is already enough for KL {search.config.kl_threshold:g}: this minimal "
            "set says which weights matter most, it protects little else (--fraction sets the size)"
        )
    return selected


def _with_controls(search: SuperweightSearch, measure: Measure, indices: Indices) -> dict[str, Any]:
    """Measure the divergence of a set, and of as many random coordinates and largest weights."""
    size = _count(indices)
    seed = derive_seed(search.config.seed, "superweights", "random control", size)
    controls: dict[str, Indices] = {
        "superweights": indices,
        "random": random_coordinates(search.loaded.shapes(), size, seed),
        "largest_weight": largest_weights(search.loaded.model, size),
    }
    return {"fraction": size / search.loaded.num_parameters, "count": size} | {
        name: divergence.to_dict() for name, divergence in zip(controls, measure(controls.values()), strict=True)
    }


def _joined(search: SuperweightSearch, selected: Indices, spikes: Sequence[Spike]) -> Indices:
    shapes = search.loaded.shapes()
    mask = BlockMask.from_indices(shapes, selected)
    for spike in spikes:
        mask = mask | BlockMask.from_indices(shapes, {spike.parameter: torch.tensor([spike.index])})
    return mask.to_indices()


def _spike_facts(spike: Spike, ranks: list[float], divergence: Divergence) -> dict[str, Any]:
    facts = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(spike).items()
    }
    return facts | {"gradient_rank_fracs": ranks} | divergence.to_dict()


def _count(indices: Mapping[str, Tensor]) -> int:
    return sum(part.numel() for part in indices.values())
