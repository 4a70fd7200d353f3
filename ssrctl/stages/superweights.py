"""`ssrctl superweights`: find the language-critical weights of a model and write them as a mask (SSR section 2.2)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssrctl.configs import SuperweightsConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.unions import combinations
from ssrctl.distributed.dividing import Spread, divide
from ssrctl.distributed.world import World, joined_world
from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_mask
from ssrctl.io.console import console, note, show_plan, warn
from ssrctl.io.files import write_text
from ssrctl.io.manifest import file_hash, published_settings, versions
from ssrctl.io.prompt_sets import load_prompt_set, prompt_set_path
from ssrctl.masks.published_superweights import published_superweights, superweights_of
from ssrctl.masks.superweight_search import (
    DEFAULT_FRACTION,
    FIRST_MINIMAL_FRACTION,
    Job,
    SuperweightSearch,
    do_job,
    find_superweights,
)
from ssrctl.models.loading import describe_model, load_model
from ssrctl.models.precision import itemsize_of, settle_dtype
from ssrctl.report.formats import times
from ssrctl.sampling.agreement import agree
from ssrctl.text.prompt_tokens import TokenisedPrompts, tokenise_prompts


def run(config: SuperweightsConfig) -> dict[str, Any]:
    """Find the superweights, write the mask and next to it the report; return the report.

    With ``--dry-run`` the model is loaded, the plan printed and returned, and nothing is written.

    Raises:
        UserError: see ``load_prompt_set``, ``tokenise_prompts`` and ``load_model``; a size below one
            weight or above the number of candidates; no activation spike with ``--method activation``.
    """
    note(describe_model(config))
    with joined_world(config.device) as world:
        return _run(settle_dtype(config), world)


def _run(config: SuperweightsConfig, world: World) -> dict[str, Any]:
    if config.output.is_dir():
        raise UserError(f"cannot write {config.output}: it is a folder", "name a file")
    path = prompt_set_path(config.prompts, config.model)
    prompts = load_prompt_set(path)
    search = _prepare(
        config, [p.text for p in prompts if p.split == "gradient"], [p.text for p in prompts if p.split == "heldout"]
    )
    plan = _plan(search, path)
    if config.dry_run:
        show_plan("superweights", plan)
        return plan
    agree(world, config, search.loaded, (), {"contents of prompts": file_hash(path)})
    search_and_write = functools.partial(_search_and_write, search, path)
    return divide(world, functools.partial(do_job, search), search_and_write) or {}


def _search_and_write(search: SuperweightSearch, path: Path, spread: Spread[Job, Any]) -> dict[str, Any]:
    config = search.config
    selected = find_superweights(search, spread)
    mask = BlockMask.from_indices(search.loaded.shapes(), selected)
    settings = published_settings(config) | {"prompts_file": path.name, "prompts_hash": file_hash(path)}
    settings |= {"versions": versions()}
    report = {
        "format": "ssrctl-superweights-report",
        "version": 1,
        "model": asdict(search.loaded.identity),
        "num_parameters": search.loaded.num_parameters,
        "prompts": _prompt_facts(search, path),
        "kl_threshold": config.kl_threshold,
        **search.report,
        "mask": {"file": config.output.name, "count": mask.count(), "fraction": mask.density()},
        "settings": settings,
    }
    save_mask(config.output, mask, mask_kind="superweights", model=search.loaded.identity, settings=settings)
    report_path = config.output.with_name(config.output.stem + ".report.json")
    write_text(report_path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if "spikes" in report:
        report["published"] = _published(report)
    _show(report)
    size = f"{mask.count()} weights, {_percent(mask.density())}"
    note(f"wrote {config.output}: {size}; {report_path.name} next to it")
    return report


# --------------------------------------------------------------------------------------------------
# before anything is computed


def _prepare(config: SuperweightsConfig, gradient: Sequence[str], heldout: Sequence[str]) -> SuperweightSearch:
    loaded = load_model(config, bytes_per_parameter=_bytes_per_parameter(config))
    longest = min(config.max_prompt_tokens, loaded.context_length or config.max_prompt_tokens)
    tokenised = tokenise_prompts(loaded.tokenizer, [*gradient, *heldout], longest)
    first, rest = tokenised.ids[: len(gradient)], tokenised.ids[len(gradient) :]
    search = SuperweightSearch(
        config, loaded, TokenisedPrompts(first, tokenised.num_cut_tokens), TokenisedPrompts(rest, 0)
    )
    if tokenised.num_cut_tokens:
        warn(f"{tokenised.num_cut_tokens} tokens beyond {longest} per prompt were cut off (--max-prompt-tokens)")
    if len(search.subsets) < config.num_subsets:
        warn(f"{len(gradient)} gradient prompts make {len(search.subsets)} subsets, not {config.num_subsets}")
    for fraction in search.fractions[:1]:
        if search.size(fraction) == 0:
            raise UserError(
                f"{fraction:.4%} of {loaded.num_parameters} weights is less than one weight", "raise --fraction"
            )
        if fraction > config.candidate_fraction:
            raise UserError(
                f"a mask of {fraction:.2%} cannot be cut from candidates of {config.candidate_fraction:.2%} per subset",
                "raise --candidate-fraction or lower --fraction",
            )
    return search


def _bytes_per_parameter(config: SuperweightsConfig) -> float:
    """Return the memory besides the weights: a gradient, and every subset's candidates as bits and scored indices."""
    if config.method == "activation":
        return itemsize_of(config)
    kept = FIRST_MINIMAL_FRACTION if config.minimal else config.fraction or DEFAULT_FRACTION
    return itemsize_of(config) + config.num_subsets * (1 / 8 + 12 * kept)


def _plan(search: SuperweightSearch, path: Path) -> dict[str, Any]:
    config, loaded = search.config, search.loaded
    num_prompts = len(search.gradient.ids)
    unions = combinations(len(search.subsets)) if search.fractions else []
    # The reference, each union, and at each size the set (beyond the first) and two controls.
    ablations = 1 + len(unions) + (3 * len(search.fractions) - 1 if search.fractions else 3)
    spikes = (
        "" if config.method == "gradient" else f" and up to one per layer for the spikes, {num_prompts} to find them"
    )
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    itemsize = loaded.model.dtype.itemsize
    memory = loaded.num_parameters * (itemsize + _bytes_per_parameter(config))
    memory += search.heldout.num_tokens * vocabulary * itemsize
    size = f"{search.fractions[0]:.3%}" if search.fractions else "the spikes found"
    return {
        "parameters": loaded.num_parameters,
        "method": config.method,
        "mask_size": f"{size}, shrunk while KL >= {config.kl_threshold}" if config.minimal else size,
        "prompts": f"{path.name}: {num_prompts} for gradients, {len(search.heldout.ids)} held out",
        "tokens": f"{search.gradient.num_tokens} for gradients, {search.heldout.num_tokens} held out",
        "prompt_subsets": len(search.subsets),
        "unions": len(unions),
        "backward_passes": num_prompts,
        "forward_passes": f"at most {ablations} over the {len(search.heldout.ids)} held-out prompts{spikes}",
        "memory": f"about {memory / 2**30:.2f} GiB",
        "output": str(config.output),
    }


def _prompt_facts(search: SuperweightSearch, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "num_gradient": len(search.gradient.ids),
        "num_heldout": len(search.heldout.ids),
        "num_gradient_tokens": search.gradient.num_tokens,
        "num_heldout_tokens": search.heldout.num_tokens,
        "num_cut_tokens": search.gradient.num_cut_tokens,
        "subsets": search.subsets,
    }


def _published(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the published super weights of this model, each with a mark whether a spike is there; None without any."""
    known = superweights_of(report["model"]["name"])
    if known is None:
        return None
    places = {(spike["parameter"], spike["out_channel"], spike["in_channel"]) for spike in report["spikes"]}
    rows = zip(known.weights, known.found(places), strict=True)
    return {
        "source": known.source,
        "model": known.model,
        "weights": [
            {"layer": layer, "out_channel": out, "in_channel": into, "found": found}
            for (layer, out, into), found in rows
        ],
    }


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
        table = Table(title="activation spikes, each weight set to zero by itself", title_justify="left")
        for heading in ("weight", "value", "input, output over median", "gradient rank from the top", "KL"):
            table.add_column(heading, overflow="fold")
        for spike in report["spikes"]:
            where = f"{spike['parameter']} [{spike['out_channel']}, {spike['in_channel']}]"
            ratios = f"{_number(spike['input_ratio'], 0)}, {_number(spike['output_ratio'], 0)}"
            ranks = f"{_percent(min(spike['gradient_rank_fracs']))} to {_percent(max(spike['gradient_rank_fracs']))}"
            table.add_row(where, f"{spike['weight']:.3f}", ratios, ranks, _pair(spike))
        console().print(table)
    if "spikes" in report:
        note(_published_line(report))
    last = labelled[-1][1]["random"]["kl_masked_reference"]
    if last is None or last >= report["kl_threshold"]:
        note(
            f"as many random weights also give KL {_number(last, 2)}, so reaching {report['kl_threshold']:g} "
            "proves little at this size: compare the columns"
        )


def _published_line(report: Mapping[str, Any]) -> str:
    """Return a sentence that puts the spikes beside the published ones: of this model, else of all."""
    if known := report["published"]:
        rows = [
            f"layer {row['layer']} [{row['out_channel']}, {row['in_channel']}] {'found' if row['found'] else 'not found'}"
            for row in known["weights"]
        ]
        return f"published for {known['model']} ({known['source']}): {'; '.join(rows)}"
    models = published_superweights()
    counts = [len(one.weights) for one in models]
    layers = [layer for one in models for layer, _, _ in one.weights]
    return (
        f"published for {len(models)} other models ({models[0].source}): {min(counts)} to {max(counts)} weights each, in layers "
        f"{min(layers)} to {max(layers)}; here {times(len(report['spikes']), 'spike')}"
    )


def _pair(row: Mapping[str, Any]) -> str:
    return f"{_number(row['kl_masked_reference'], 3)}, {_number(row['kl_reference_masked'], 3)}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _number(value: float | None, digits: int) -> str:
    return "unbounded" if value is None else f"{value:.{digits}f}"
