"""`ssrctl diagnose MODEL --intervene`: a model with the same function and other weights (Zhu et al. 2025, app. D)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssrctl.checkpoints.files import INDEX, SINGLE
from ssrctl.checkpoints.model_folder import check_free, copy_companions, whole_folder
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.checkpoints.tensor_files import read_pieces
from ssrctl.configs import TINY, DiagnoseConfig
from ssrctl.configs.common import ModelConfig
from ssrctl.configs.layers import layer_ranges
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.console import note, show_plan
from ssrctl.io.files import write_text
from ssrctl.io.manifest import versions
from ssrctl.io.package_data import profile_path
from ssrctl.io.tensor_writing import NewTensor, aligned_order, stored_bytes, write_header
from ssrctl.models.interventions import (
    Attention,
    Edit,
    LogitDifference,
    apply_edits,
    attention_layers,
    chosen_layers,
    edits,
    logit_difference,
    logits_on,
)
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.report.formats import json_safe

REPORT = "intervention.json"
# In float32 a model of 30 layers loses about 3e-6 of its largest logit; outliers and large biases cost more. A wrong
# rotation is off by about the logits themselves.
TOLERANCE = 1e-3
_NUM_PROMPTS = 4
_PROMPT_TOKENS = 48
_STORED_AND_FLOAT32 = 4.0  # bytes per parameter in addition to the stored weights, while both are held


def run_intervene(config: DiagnoseConfig) -> dict[str, Any]:
    """Write the model of ``config.paths`` with some layers' attention rotated or permuted to ``config.output_dir``.

    The function is checked twice on a few texts: in float32, where it has to be the same within ``TOLERANCE`` of the
    largest logit, and with what was written, in the dtype that transformers loads it in, where rounding shows.

    Returns:
        What intervention.json in the folder holds; under ``--dry-run`` the plan.

    Raises:
        UserError: an architecture that is not supported, layers that the model does not have, an output that exists,
            or logits that differ in float32 (nothing is written then).
    """
    assert config.intervene is not None
    assert config.output_dir is not None
    output = config.output_dir
    check_free(output)
    loaded = load_model(_model_config(config.paths[0]), bytes_per_parameter=_STORED_AND_FLOAT32)
    chosen = chosen_layers(
        attention_layers(loaded.model), None if config.layers is None else layer_ranges(config.layers)
    )
    made = edits(chosen, config.intervene, config.seed)
    with TensorReader(config.paths[0]) as reader:
        reader.align([name for name, _ in loaded.model.named_parameters()])
        _check_stored(reader, made)
        report = {
            "format": "ssrctl-intervention",
            "version": 1,
            "kind": config.intervene,
            "seed": config.seed,
            "layers": [attention.layer for attention in chosen],
            "model": asdict(loaded.identity),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "changed_tensors": sorted(made),
            "notes": _notes(chosen, config.intervene),
        }
        if config.dry_run:
            report |= {"reads": [str(file) for file in reader.files], "writes": str(output)}
            _show_plan(report)
            return report
        prompts = _prompts(loaded, config)
        stored_logits, differences = _check_function(loaded, made, prompts)
        with whole_folder(output) as folder:
            copy_companions(reader.folder, folder)
            _write_weights(reader, made, folder)
            differences["stored"] = _written_difference(folder, prompts, stored_logits)
            report |= {"tolerance": TOLERANCE, "versions": versions()}
            report |= {name: asdict(one) | {"relative": one.relative} for name, one in differences.items()}
            text = json.dumps(json_safe(report), indent=1, ensure_ascii=False, allow_nan=False)
            write_text(folder / REPORT, text + "\n")
    _show(report, output)
    return report


def _model_config(path: Path) -> ModelConfig:
    """Return settings that load a folder, or the bundled model, on the CPU in the dtype that its config asks for."""
    if str(path) == TINY:
        return ModelConfig(dtype="stored", device="cpu")
    if not path.is_dir():
        raise UserError(
            f"{path} is not a model folder", "name a folder with config.json and safetensors; `hf download` fetches one"
        )
    return ModelConfig(model=str(path.absolute()), dtype="stored", device="cpu")


def _check_stored(reader: TensorReader, made: Mapping[str, Edit]) -> None:
    if absent := [name for name in made if name not in reader.shapes]:
        raise UserError(
            f"{reader.label} stores no tensor {absent[0]} ({len(absent)} such), though its model has that parameter",
            "load it with transformers and save it again with save_pretrained",
        )


def _notes(chosen: Sequence[Attention], kind: str) -> list[str]:
    normed = [str(attention.layer) for attention in chosen if attention.has_qk_norm]
    if kind != "rotate" or not normed:
        return []
    return [
        f"q and k of layers {', '.join(normed)} stay as they are: their q_norm and k_norm scale each dimension by "
        "itself, which no rotation commutes with. v and o are rotated."
    ]


def _prompts(loaded: LoadedModel, config: DiagnoseConfig) -> list[Tensor]:
    """Return a few texts as token ids, and the same number of random ids of the whole vocabulary."""
    from ssrctl.io.prompt_sets import load_prompt_set

    name = TINY if str(config.paths[0]) == TINY else "general"
    texts = [prompt.text for prompt in load_prompt_set(profile_path("prompts", name, ".jsonl"))][:_NUM_PROMPTS]
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    longest = min(_PROMPT_TOKENS, loaded.context_length or _PROMPT_TOKENS)
    encoded = [loaded.tokenizer(text, verbose=False)["input_ids"][:longest] for text in texts]
    if (highest := max((max(ids, default=0) for ids in encoded), default=0)) >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {highest}, the model has {vocabulary} embeddings",
            "the tokenizer is not this model's: copy the model again",
        )
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "intervene", "prompts"))
    drawn = torch.randint(vocabulary, (longest,), generator=generator)
    return [*(torch.tensor(ids) for ids in encoded if ids), drawn]


def _check_function(
    loaded: LoadedModel, made: Mapping[str, Edit], prompts: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, LogitDifference]]:
    """Return the logits in the model's own dtype, and how far the edits move them; leave the model changed.

    ``float32`` is how far the edits move the logits in float32; ``dtype_alone`` how far the unchanged model's logits in
    its own dtype are from those in float32, to compare the written model's difference with.

    Raises:
        UserError: further than ``TOLERANCE``.
    """
    stored = logits_on(loaded.model, prompts)
    loaded.model.float()
    before = logits_on(loaded.model, prompts)
    apply_edits(loaded.model, made)
    found = logit_difference(before, logits_on(loaded.model, prompts))
    if not found.relative <= TOLERANCE:
        raise UserError(
            f"the function would change: in float32 logits differ by up to {found.max_abs:.3g}, {found.relative:.2g} "
            f"of the largest ({TOLERANCE:g} is allowed); nothing was written",
            "this model's attention is not what its name says; choose other layers or the other intervention",
        )
    return stored, {"float32": found, "dtype_alone": logit_difference(before, stored)}


def _write_weights(reader: TensorReader, made: Mapping[str, Edit], folder: Path) -> None:
    """Write every tensor in the layout and dtype of the base; those without an edit bit for bit."""
    if joined := sorted(made.keys() & reader.name_map.joined.keys()):
        raise UserError(
            f"{joined[0]} is put together from several of the file's tensors and cannot be written",
            "choose other layers",
        )
    weight_map, total = {}, 0
    for file in reader.files:
        target = file.relative_to(reader.folder) if reader.sharded else Path(SINGLE)
        held = reader.stored_in(file)
        tensors = aligned_order(
            NewTensor(name, stored.dtype, stored.shape) for name, stored in held.items() if stored.dtype is not None
        )
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        with (folder / target).open("wb") as stream:
            write_header(stream, tensors, {"format": "pt"})
            for tensor in tensors:
                name = reader.name_map.to_parameter(tensor.name)
                if name in made:
                    stream.write(stored_bytes(made[name](reader.tensor(name)).to(tensor.dtype)))
                else:
                    stream.writelines(stored_bytes(piece) for piece in read_pieces(file, held[tensor.name]))
                weight_map[tensor.name] = target.as_posix()
                total += tensor.nbytes
    if reader.sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def _written_difference(folder: Path, prompts: Sequence[Tensor], before: Sequence[Tensor]) -> LogitDifference:
    """Return the distance of the written model's logits from the base's, both in the dtype that they are loaded in."""
    return logit_difference(before, logits_on(load_model(_model_config(folder)).model, prompts))


def _show_plan(plan: Mapping[str, Any]) -> None:
    shown = {key: plan[key] for key in ("kind", "seed", "dtype", "writes")}
    shown |= {key: ", ".join(map(str, plan[key])) for key in ("layers", "reads")}
    show_plan("intervention", shown | {"model": plan["model"]["name"], "changed_tensors": len(plan["changed_tensors"])})
    for line in plan["notes"]:
        note(line)


def _show(report: Mapping[str, Any], output: Path) -> None:
    for line in report["notes"]:
        note(line)
    rows = {"float32": "maximum logit difference in float32"}
    if report["dtype"] != "float32":
        rows["stored"] = f"the same in {report['dtype']}, as written"
        rows["dtype_alone"] = f"for comparison, the unchanged model in {report['dtype']} against float32"
    for key, what in rows.items():
        row = report[key]
        note(
            f"{what}: {row['max_abs']:.3g} (largest logit {row['max_logit']:.3g}), KL {row['mean_kl']:.2g} nats on "
            f"average, {row['max_kl']:.2g} at most, same top token at {row['same_top_frac']:.1%} of "
            f"{row['num_positions']} positions"
        )
    note(f"wrote {output}: {len(report['changed_tensors'])} tensors changed, {REPORT} says how")
