"""Loading of a causal language model and its tokenizer, with a one-line error for every failure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import TINY, ModelConfig
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity

if TYPE_CHECKING:
    import torch

# Headers, config and tokenizer take far less than this reserve.
MEMORY_RESERVE_BYTES = 512 * 2**20
# Below this many parameters, sharing an operation among threads costs more than the operation.
SINGLE_THREAD_PARAMETERS = 5_000_000


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        model: the causal LM, in eval mode, on its device.
        tokenizer: a fast tokenizer with a pad token.
        identity: name, revision and fingerprint of the weights as stored.
        context_length: positions the model has; None when its config does not say.
    """

    model: Any
    tokenizer: Any
    identity: ModelIdentity
    context_length: int | None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every trainable tensor by name; a tied tensor once."""
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def describe_model(config: ModelConfig) -> str:
    """Return the first line of every command that loads a model."""
    if config.model == TINY:
        return f"model: {TINY}, the bundled default (give --model for your own)"
    return f"model: {config.model}"


def load_model(config: ModelConfig, *, bytes_per_parameter: float = 0.0) -> LoadedModel:
    """Load ``config.model`` and its tokenizer.

    Args:
        config: name, precision and device of the model.
        bytes_per_parameter: memory that the caller will need in addition to the weights; the sum is checked against
            the free memory before anything is read.

    Raises:
        UserError: not found, not reachable, corrupt weights, too large for the memory, no fast tokenizer, no pad
            or end token.
    """
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # load errors sum up its retries in one line
    source = _source(config)
    device = resolve_device(config.device)
    _check_memory(config, source, device, bytes_per_parameter)
    tokenizer = _load_tokenizer(config, source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=config.revision, dtype="auto", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise _load_error(config, error) from error
    identity = ModelIdentity(
        name=Path(config.model).name if Path(config.model).exists() else config.model,
        revision=config.revision,
        fingerprint=_fingerprint(model),
    )
    dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        # Only tensors that the checkpoint stores: computed buffers, such as rotary frequencies, stay in float32, as
        # transformers keeps them.
        stored = model.state_dict().keys()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        model = model.to(device=device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{config.model} does not fit on {device}: {_first_line(error)}", "use --dtype bfloat16 or another --device"
        ) from error
    if (
        device.type == "cpu"
        and "OMP_NUM_THREADS" not in os.environ
        and model.num_parameters() < SINGLE_THREAD_PARAMETERS
    ):
        torch.set_num_threads(1)
    return LoadedModel(model, tokenizer, identity, getattr(model.config, "max_position_embeddings", None))


def resolve_device(name: str) -> torch.device:
    """Return the device; ``auto`` is the accelerator that accelerate would pick, else the CPU.

    Sums are in float64, which mps does not support; ``auto`` is the CPU there.
    """
    import torch
    from accelerate.state import PartialState

    if name == "auto":
        state = PartialState()
        if state.num_processes > 1:
            raise UserError(
                f"{state.num_processes} processes were launched, ssrctl runs in one", "start it without a launcher"
            )
        return torch.device("cpu") if state.device.type == "mps" else state.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name} cannot be used: {_first_line(error)}", "give --device cpu or auto") from error
    return device


def _source(config: ModelConfig) -> str:
    """Return the source for transformers: the bundled folder, a local folder, or a hub name."""
    if config.model == TINY:
        from ssrctl import tiny_reasoner

        return str(tiny_reasoner.path())
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "merge the adapter into its model first" if (path / "adapter_config.json").is_file() else None
            raise UserError(
                f"{path} has no config.json, so it is not a model folder", hint or "name the folder that has it"
            )
        return str(path)
    if path.exists() or path.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise UserError(f"model folder not found: {config.model}", "name a folder with config.json and safetensors")
    return config.model


def _load_tokenizer(config: ModelConfig, source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(config, error) from error
    check_tokenizer(tokenizer, config.model)
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Check the tokenizer, and use the end token as pad token if it has none.

    Raises:
        UserError: no character offsets (a slow tokenizer), or neither pad nor end token.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name} gives no character offsets ({type(tokenizer).__name__} is not a fast one)",
            "convert it to a tokenizer.json",
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {name} has neither a pad nor an end token", "set pad_token in its config"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _check_memory(config: ModelConfig, source: str, device: torch.device, bytes_per_parameter: float) -> None:
    """Refuse a model that cannot fit before the machine starts to swap or kills the process."""
    import psutil
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(described, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(config, error) from error
    count = sum(p.numel() for p in empty.parameters())
    stored = described.dtype or torch.float32
    dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    needed = count * (dtype.itemsize + bytes_per_parameter)
    if device.type == "cpu":
        free = psutil.virtual_memory().available - MEMORY_RESERVE_BYTES
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - MEMORY_RESERVE_BYTES
    else:
        return  # other backends do not report free memory; they raise their own errors
    if needed > free:
        raise UserError(
            f"{config.model} has {count / 1e9:.2f}B parameters and would need {needed / 2**30:.1f} GiB, "
            f"{max(free, 0) / 2**30:.1f} GiB are free on {device}",
            "use --dtype bfloat16, a smaller model, or a larger machine",
        )


def _fingerprint(model: Any) -> str:
    from ssrctl.checkpoints.fingerprint import fingerprint

    return fingerprint(model.named_parameters())


def _load_error(config: ModelConfig, error: Exception) -> UserError:
    if isinstance(error, OSError) and not Path(config.model).expanduser().is_dir() and config.model != TINY:
        return UserError(
            f"model '{config.model}' is not a local folder, and the hub did not provide it: {_first_line(error)}",
            "check the name and the network, or download it elsewhere and give --model FOLDER",
        )
    return UserError(
        f"{config.model} cannot be loaded: {_first_line(error)}",
        "check that the folder is complete and its files are whole",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
