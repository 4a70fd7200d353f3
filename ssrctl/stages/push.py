"""`ssrctl push` and ``--push-to-hub``: artifacts on the hub, with a model card that says how to use them."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.delta import KIND as DELTA_KIND
from ssrctl.checkpoints.delta import DeltaFile
from ssrctl.checkpoints.files import INDEX, SINGLE
from ssrctl.checkpoints.model_folder import CONFIG
from ssrctl.checkpoints.run_dir import CHAT_TEMPLATE, DELTA_FILE, chat_template_of, find_delta
from ssrctl.configs import TINY, PushConfig
from ssrctl.errors import Stopped, UserError
from ssrctl.io import console
from ssrctl.io.artifacts import (
    MASK_FILE,
    MASK_KIND,
    ModelIdentity,
    identity_field,
    json_field,
    open_safetensors,
    read_metadata,
)
from ssrctl.io.budget_file import BUDGET_FILE, load_budget_profile
from ssrctl.io.hub import CARD_FILE, check_can_push, upload
from ssrctl.masks.headers import read_mask_header
from ssrctl.report.formats import percent
from ssrctl.version import __version__


@dataclass(frozen=True)
class Artifact:
    """An artifact of this machine and the contents of its card.

    Attributes:
        kind: ``delta``, ``mask``, ``budget-profile`` or ``sparse-update`` (a model folder), which is a tag of its card.
        files: by their names in the repository.
        base: the model that it belongs to; None where the file does not say.
        summary: sentences on what it is.
        use: commands or Python that use it, for the name of a repository.
        settings: the settings that made it.
        version: of the ssrctl that made it.
    """

    kind: str
    files: dict[str, Path]
    base: ModelIdentity | None
    summary: str
    use: str
    settings: Any
    version: str


def run(config: PushConfig) -> dict[str, Any]:
    """Upload an artifact; with ``--dry-run`` show the card instead.

    Raises:
        UserError: not an artifact, or the hub does not take it.
    """
    return _push(config.path, config.repo, private=config.private, dry_run=config.dry_run)


def push_written(path: Path, repo: str, *, private: bool) -> dict[str, Any]:
    """Upload what a command has just written.

    Raises:
        Stopped: the upload failed; the files are there.
    """
    try:
        return _push(path, repo, private=private)
    except UserError as error:
        again = f"ssrctl push {shlex.quote(str(path))} {repo}{' --private' * private}"
        raise Stopped(
            f"{path} is written, but not uploaded: {error.message}", f"{error.remedy}; then run `{again}`"
        ) from error


def _push(path: Path, repo: str, *, private: bool, dry_run: bool = False) -> dict[str, Any]:
    artifact = read_artifact(path)
    metadata, text = card_metadata(artifact), card_text(artifact, repo)
    size = sum(file.stat().st_size for file in artifact.files.values())
    names = sorted({*artifact.files, CARD_FILE})
    plan: dict[str, Any] = {"repo": repo, "kind": artifact.kind, "files": names, "bytes": size}
    if dry_run:
        console.show_plan("plan", plan | {"files": ", ".join(names)})
        console.note(text)
        return plan
    check_can_push(repo)
    address = upload(repo, artifact.files, metadata, text, private=private)
    console.note(f"uploaded to {address}")
    return plan | {"url": address}


def read_artifact(path: Path) -> Artifact:
    """Return the artifact that ``path`` means.

    Raises:
        UserError: none of ours, or a damaged one.
    """
    if path.is_dir() and ((path / SINGLE).exists() or (path / INDEX).exists()):
        return _applied_folder(path)
    if path.is_file() and path.suffix == ".json":
        return _budget_profile(path)
    if path.is_file():
        with open_safetensors(path) as file:
            kind = (file.metadata() or {}).get("ssrctl_kind")
        if kind == MASK_KIND:
            return _mask(path)
        if kind != DELTA_KIND:
            raise UserError(
                f"{path} is neither a delta nor a mask" + (f": it is a {kind}" if kind else ""),
                "upload other files with `hf upload`",
            )
    elif not path.exists():
        raise UserError(f"{path} not found", "name a delta, a mask, a budget profile, a run or an applied folder")
    return _delta(find_delta(path))


def _delta(path: Path) -> Artifact:
    delta = DeltaFile(path)
    files = {DELTA_FILE: path}
    if (template := chat_template_of(path)) is not None:
        files[CHAT_TEMPLATE] = template
    weights = sum(map(math.prod, delta.shapes.values()))
    summary = (
        f"A delta: the {delta.count:,} of {weights:,} weights ({percent(delta.count / weights)}) that differ from the base, "
        "with their new values, bit for bit."
    )
    base = shlex.quote(_address(delta.base))
    use = (
        f"ssrctl delta apply {base} REPO -o tuned    # an ordinary model folder\n"
        f"ssrctl eval {_model_flags(delta.base)} --checkpoint REPO --dataset test.jsonl -o eval/tuned\n"
        f"ssrctl diagnose {base} REPO    # what the update did to the weights"
    )
    return Artifact("delta", files, delta.base, summary, _shell(use), delta.settings, str(delta.version))


def _mask(path: Path) -> Artifact:
    header, metadata = read_mask_header(path), read_metadata(path, MASK_KIND)
    summary = (
        f"A mask (`{header.kind}`): {header.count:,} of {header.numel:,} weights ({percent(header.count / header.numel)}), "
        "as block sparse rows or packed gaps."
    )
    model = "--model MODEL" if header.model is None else _model_flags(header.model)
    flag = "--protect" if header.kind == "superweights" else "--mask"
    does = "keeps these weights as they are" if header.kind == "superweights" else "trains these weights only"
    use = f"ssrctl train {model} {flag} REPO --dataset train.jsonl    # {does}\nssrctl mask info REPO"
    return Artifact(
        "mask",
        {MASK_FILE: path},
        header.model,
        summary,
        _shell(use),
        json_field(metadata, "settings", path),
        str(metadata.get("ssrctl_version")),
    )


def _budget_profile(path: Path) -> Artifact:
    profile = load_budget_profile(path)
    curve = ", ".join(f"{value:.3f}" for value in profile.curve("share"))
    summary = (
        f"A budget profile: the share of each reasoning step's gradient that earlier steps have left, over "
        f"{profile.mass.num_problems[0]} problems: {curve}."
    )
    use = f"ssrctl train {_model_flags(profile.model)} --budget-profile REPO --dataset train.jsonl"
    version = profile.settings.get("versions", {}).get("ssrctl", __version__)
    return Artifact(
        "budget-profile", {BUDGET_FILE: path}, profile.model, summary, _shell(use), profile.settings, version
    )


def _applied_folder(path: Path) -> Artifact:
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    files = {name: file for name, file in files.items() if not name.startswith(".") and name != CARD_FILE}
    weights = next(file for name, file in files.items() if name.endswith(".safetensors"))
    with open_safetensors(weights) as opened:
        metadata = dict(opened.metadata() or {})
    if "base" not in metadata or "ssrctl_version" not in metadata or CONFIG not in files:
        raise UserError(
            f"{path} is not a model folder that `ssrctl delta apply` wrote", "upload other models with `hf upload`"
        )
    use = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("REPO", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("REPO")'
    )
    return Artifact(
        "sparse-update",
        files,
        identity_field(metadata, "base", weights),
        "A model: the base with a sparse update applied.",
        f"```python\n{use}\n```",
        json_field(metadata, "settings", weights),
        metadata["ssrctl_version"],
    )


# --------------------------------------------------------------------------------------------------
# the card


def card_metadata(artifact: Artifact) -> dict[str, Any]:
    """Return the yaml header of the card; a base that is not on the hub by that name is left out, and so is a license."""
    metadata: dict[str, Any] = {}
    if artifact.base is not None and "/" in artifact.base.name:
        metadata["base_model"] = artifact.base.name
    if artifact.kind == "sparse-update":
        metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    else:
        metadata["library_name"] = "ssrctl"
    return metadata | {"tags": ["ssrctl", artifact.kind]}


def card_text(artifact: Artifact, repo: str) -> str:
    """Return the card below its header."""
    import yaml

    base = artifact.base
    if base is None:
        about = "The file does not say for which weights it was made; only the shapes of their tensors are checked."
    else:
        revision = "" if base.revision is None else f" at revision `{base.revision}`"
        about = (
            f"Base: `{base.name}`{revision}, fingerprint of its weights `{base.fingerprint}`. It is checked before the "
            "artifact is used."
        )
        if artifact.kind == "sparse-update":
            about = about.partition(" It is checked")[0]
    settings = yaml.safe_dump(artifact.settings, sort_keys=True, allow_unicode=True)
    return "\n".join(
        [
            f"# {repo.rpartition('/')[2]}",
            "",
            artifact.summary,
            "",
            about,
            "",
            "## Use",
            "",
            artifact.use.replace("REPO", repo),
            "",
            f"<details><summary>Settings (ssrctl {artifact.version})</summary>",
            "",
            f"```yaml\n{settings}```",
            "",
            "</details>",
            "",
        ]
    )


def _address(model: ModelIdentity) -> str:
    """Return a base as commands on checkpoints take it: a name on the hub with its revision, or a local folder."""
    if "/" in model.name:
        return model.name if model.revision is None else f"{model.name}@{model.revision}"
    return model.name if model.name == TINY else f"./{model.name}"


def _model_flags(model: ModelIdentity) -> str:
    """Return a base as commands that load models take it."""
    revision = "" if model.revision is None else f" --revision {shlex.quote(model.revision)}"
    return f"--model {shlex.quote(model.name if '/' in model.name else _address(model))}{revision}"


def _shell(text: str) -> str:
    return f"```bash\n{text}\n```"
