"""Loading of a causal language model and its tokenizer, with a one-line error for every failure."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.files import check_folder
from ssrctl.configs import TINY, ModelConfig
from ssrctl.errors import UserError, first_line
from ssrctl.io import console
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.models.precision import repeat_sums, resolve_device, settle_dtype, suit_threads
from ssrctl.models.weight_checks import check_all_loaded, check_finite, check_tokens, head_is_untied

if TYPE_CHECKING:
    import torch

# Headers, config and tokenizer take far less than this reserve.
MEMORY_RESERVE_BYTES = 512 * 2**20
# More than any model has; a config that asks for more would keep transformers building modules for hours.
MOST_LAYERS = 10_000
UNREAD = "not read"  # the fingerprint of a model of which only the config was read
UNTIED = (
    "{name}: the config ties the output head to the embedding, but the file stores a head of other values: it is used"
)


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


def load_model(config: ModelConfig, *, bytes_per_parameter: float = 0.0, kind: Any = None) -> LoadedModel:
    """Load ``config.model`` and its tokenizer.

    Args:
        config: name, precision and device of the model.
        bytes_per_parameter: memory that the caller will need in addition to the weights; the sum is checked against
            the free memory before anything is read.
        kind: the class with ``from_pretrained`` and ``from_config``; AutoModelForCausalLM by default.

    Only safetensors are read, and of a local folder no file that a link leads out to.

    Raises:
        UserError: not found, not reachable, corrupt weights, weights that the file lacks or that are NaN or infinite,
            too large for the memory, no fast tokenizer, no pad or end token.
    """
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    kind = kind or AutoModelForCausalLM
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # load errors sum up its retries in one line
    source = _source(config)
    config = settle_dtype(config)
    device = resolve_device(config.device)
    if getattr(config, "repeatable_sums", True):
        repeat_sums(device)
    _check_memory(config, device, bytes_per_parameter, kind)
    tokenizer = _load_tokenizer(config, source)
    with _explained(config), _quiet_report():
        model, report = kind.from_pretrained(
            source,
            revision=config.revision,
            dtype="auto",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their shapes
            output_loading_info=True,
            **({} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}),
        )
    for remark in (
        check_all_loaded(config.model, model, report),
        check_tokens(config.model, model, tokenizer),
        UNTIED.format(name=config.model) if head_is_untied(model) else None,
    ):
        if remark is not None:
            console.warn(remark)
    identity = ModelIdentity(
        name=Path(config.model).name if Path(config.model).exists() else config.model,
        revision=config.revision,
        fingerprint=_fingerprint(model),
    )
    dtype = model.dtype if config.dtype == "stored" else getattr(torch, config.dtype)
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
            f"{config.model} does not fit on {device}: {first_line(error)}", "use --dtype bfloat16 or another --device"
        ) from error
    check_finite(config.model, dict(model.named_parameters()))
    if device.type == "cpu":
        suit_threads(model.num_parameters())
    return LoadedModel(model, tokenizer, identity, context_length(model.config))


def context_length(config: Any) -> int | None:
    """Return the number of positions of a model by its config; None where that does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def _source(config: ModelConfig, *, with_weights: bool = True) -> str:
    """Return the source for transformers: the bundled folder, a local folder (checked for weights), or a hub name."""
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
        if with_weights:
            check_folder(path)
        return str(path)
    if path.exists() or path.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise UserError(f"model folder not found: {config.model}", "name a folder with config.json and safetensors")
    return config.model


def read_config(config: ModelConfig) -> Any:
    """Return the transformers config of a model; its weights are not read and need not be there.

    Raises:
        UserError: not found, not reachable, or of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    source = _source(config, with_weights=False)
    with _explained(config):
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)


def read_tokenizer(config: ModelConfig) -> Any:
    """Return the tokenizer of a model without its weights; raises as ``load_model`` does."""
    return _load_tokenizer(config, _source(config, with_weights=False))


def folder_of(config: ModelConfig) -> Path:
    """Return the folder that a model which was loaded came from; that of the hub's cache for a name on the hub."""
    from transformers.utils import cached_file

    return Path(cached_file(_source(config), "config.json", revision=config.revision)).parent


def _load_tokenizer(config: ModelConfig, source: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    with _explained(config, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    with _explained(config, "the tokenizer of "):
        vocabularies = {"tokenizer.json", "tekken.json", *tokenizer.vocab_files_names.values()}
        stored = any(
            cached_file(
                source,
                name,
                revision=config.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for name in sorted(vocabularies)
        )
    if not stored:  # transformers makes an empty tokenizer of the model's kind then
        raise UserError(
            f"{config.model} has no tokenizer: none of {', '.join(sorted(vocabularies))}",
            "copy the base model's tokenizer files into the folder",
        )
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


def load_skeleton(config: ModelConfig) -> LoadedModel:
    """Build a model from its config alone, on the meta device; its weights are not read and need not be there.

    Returns:
        The model, with ``UNREAD`` as fingerprint. The tokenizer is None where there is none.

    Raises:
        UserError: no config, or one that no causal LM can be made of.
    """
    source = _source(config, with_weights=False)
    model = _empty_model(config)
    try:
        tokenizer = _load_tokenizer(config, source)
    except UserError as error:
        console.warn(f"{error.message}; prompts are not read")
        tokenizer = None
    name = Path(config.model).name if Path(config.model).exists() else config.model
    identity = ModelIdentity(name=name, revision=config.revision, fingerprint=UNREAD)
    return LoadedModel(model, tokenizer, identity, context_length(model.config))


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device without a reserve; None where the device does not report it."""
    import psutil
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available) - MEMORY_RESERVE_BYTES
    return torch.cuda.mem_get_info(device)[0] - MEMORY_RESERVE_BYTES if device.type == "cuda" else None


def _empty_model(config: ModelConfig, kind: Any = None) -> Any:
    """Build the model on the meta device, from its config."""
    import torch
    from transformers import AutoModelForCausalLM

    described = read_config(config)
    _check_config(config, described)
    with _explained(config), torch.device("meta"):
        return (kind or AutoModelForCausalLM).from_config(described, trust_remote_code=config.trust_remote_code).eval()


def _check_memory(config: ModelConfig, device: torch.device, bytes_per_parameter: float, kind: Any) -> None:
    """Refuse a model that cannot fit before the machine starts to swap or kills the process."""
    import torch

    empty = _empty_model(config, kind)
    count = sum(p.numel() for p in empty.parameters())
    stored = empty.config.dtype or torch.float32
    dtype = stored if config.dtype == "stored" else getattr(torch, config.dtype)
    needed = count * (dtype.itemsize + bytes_per_parameter)
    free = free_bytes(device)  # backends that do not report it raise their own errors
    if free is not None and needed > free:
        raise UserError(
            f"{config.model} has {count / 1e9:.2f}B parameters and would need {needed / 2**30:.1f} GiB, "
            f"{max(free, 0) / 2**30:.1f} GiB are free on {device}",
            "use --dtype bfloat16, a smaller model, or a larger machine",
        )


def _fingerprint(model: Any) -> str:
    from ssrctl.checkpoints.fingerprint import fingerprint

    return fingerprint(model.named_parameters())


def _check_config(config: ModelConfig, described: Any) -> None:
    """Refuse what no causal LM can be made of, before its modules are built."""
    import torch

    text = described.get_text_config()
    if getattr(described, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model} is an encoder-decoder ({described.model_type})", "name a decoder-only (causal) model"
        )
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{config.model}: config.json asks for {layers:.3g} layers", "copy the model again")
    rows, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    if isinstance(rows, int) and isinstance(pad, int) and pad >= rows:
        raise UserError(
            f"{config.model}: pad_token_id {pad} in config.json is beyond its vocab_size {rows}",
            "set pad_token_id to a token that the model knows, or to null",
        )
    if described.dtype is not None and not isinstance(described.dtype, torch.dtype):
        raise UserError(
            f"{config.model}: config.json asks for dtype {described.dtype!r}", "bfloat16, float16 or float32 is meant"
        )


@contextlib.contextmanager
def _explained(config: ModelConfig, part: str = "") -> Iterator[None]:
    """Turn whatever transformers raises into one line, with the cause kept.

    Its loaders raise nearly every type on a damaged or foreign folder (AssertionError, IndexError, RecursionError,
    errors of other packages' own), so all are caught here, and only here.
    """
    try:
        yield
    except Exception as error:
        raise _load_error(config, error, part) from error


@contextlib.contextmanager
def _quiet_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing tensors and its note on ties; a line of our own says it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def no_report(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message and "we will NOT tie them" not in message

    logger.addFilter(no_report)
    try:
        yield
    finally:
        logger.removeFilter(no_report)


def _load_error(config: ModelConfig, error: Exception, part: str = "") -> UserError:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return UserError(
            f"{config.model} brings its own code, which is not run unasked",
            "give --trust-remote-code if you trust it",
        )
    if "Unrecognized configuration class" in reason or "Unrecognized model" in reason:
        return UserError(
            f"{config.model} is not a causal language model that transformers knows",
            "give a text model; of one that sees or hears as well, save its language model by itself",
        )
    if "does not recognize this architecture" in reason:
        return UserError(f"{config.model}: {reason.partition(' This could')[0]}", "upgrade transformers")
    if "backend tokenizer" in reason:
        return UserError(
            f"{config.model} has no tokenizer that can be read", "copy the base model's tokenizer files into the folder"
        )
    if config.attn_implementation != "auto" and ("attention" in reason or "Flash" in reason or "flash" in reason):
        return UserError(
            f"{config.model} cannot use --attn-implementation {config.attn_implementation}: {reason}",
            "use --attn-implementation auto",
        )
    if isinstance(error, ImportError):
        return UserError(
            f"{part}{config.model} needs a package that is absent: {reason}",
            "install it, or name a model that is not quantised",
        )
    if isinstance(error, OSError) and not Path(config.model).expanduser().is_dir() and config.model != TINY:
        return UserError(
            f"model '{config.model}' is not a local folder, and the hub did not provide it: {reason}",
            "check the name and the network, or download it elsewhere and name its folder",
        )
    return UserError(
        f"{part}{config.model} cannot be loaded: {reason}", "check that the folder is complete and its files are whole"
    )
