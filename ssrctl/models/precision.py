"""The precision of a run: its dtype by device, its attention, TF32, sums that repeat; and the threads of small models."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ssrctl.configs import ModelConfig
from ssrctl.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings", bound=ModelConfig)

# Below this many parameters, sharing an operation among threads costs more than the operation.
SINGLE_THREAD_PARAMETERS = 5_000_000


def resolve_device(name: str) -> torch.device:
    """Return the device; ``auto`` is the accelerator that accelerate would pick, else the CPU.

    Sums are in float64, which mps does not support; ``auto`` is the CPU there.
    """
    import torch
    from accelerate.state import PartialState

    if name == "auto":
        state = PartialState()
        return torch.device("cpu") if state.device.type == "mps" else state.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name} cannot be used: {first_line(error)}", "give --device cpu or auto") from error
    return device


def settle_dtype(config: Settings) -> Settings:
    """Replace the dtype ``auto`` by bfloat16 on a CUDA device that computes in it, else by float32.

    What a command compares or records is then the precision in force, on whatever device it is continued.

    Raises:
        UserError: the device cannot be used.
    """
    if config.dtype != "auto":
        return config
    import torch

    native = resolve_device(config.device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(config, dtype="bfloat16" if native else "float32")


def itemsize_of(config: ModelConfig, model: Any = None) -> int:
    """Return the bytes of a weight in the settled dtype.

    Args:
        config: of the model.
        model: loaded or a skeleton, whose own dtype counts where the settings ask for that of the checkpoint; None takes 4.
    """
    if config.dtype == "stored" and model is not None:
        return next(model.parameters()).element_size()  # type: ignore[no-any-return]
    return 2 if config.dtype in ("bfloat16", "float16") else 4


def suit_threads(num_parameters: int) -> None:
    """Let torch use one thread for tensors of a small model, unless ``OMP_NUM_THREADS`` says how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and num_parameters < SINGLE_THREAD_PARAMETERS:
        torch.set_num_threads(1)


def repeat_sums(device: torch.device) -> None:
    """Make sums on a CUDA device the same in every run, since gradients decide which coordinates are selected.

    Embeddings and matrix products then add in a fixed order, attention within ``ordered_sums``; selection itself counts in
    integers. An operation that has no such form warns by its name. cuDNN's attention is switched off: it compiles a plan for
    each length, and lengths differ all the time. Call it before the first matrix product.
    """
    import torch

    if device.type != "cuda":
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a check for reads of unwritten memory, not needed here
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def ordered_sums() -> Iterator[None]:
    """Let backward passes within add up in a fixed order, if ``repeat_sums`` was called for a CUDA device.

    torch's attention does so only where operations without such a form are errors instead of warnings.

    Raises:
        UserError: the model has an operation without a fixed order.
    """
    import torch

    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"the gradients cannot be added up in a fixed order: {first_line(error)}",
            "give --no-repeatable-sums, or --device cpu",
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def precision_of(model: Any) -> dict[str, Any]:
    """Return the precision that a loaded model computes in, for a manifest."""
    import torch

    device = model.device
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": getattr(model.config, "_attn_implementation", None),
        "tf32": device.type == "cuda" and bool(torch.backends.cuda.matmul.allow_tf32),
        "repeatable_sums": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
    }


def describe_precision(model: Any) -> str:
    """Return the line of the log that states the precision."""
    made = precision_of(model)
    tf32 = "" if made["device"] == "cpu" else f", TF32 {'on' if made['tf32'] else 'off'}"
    return f"precision: {made['dtype']} on {made['device']}, attention {made['attention']}{tf32}"
