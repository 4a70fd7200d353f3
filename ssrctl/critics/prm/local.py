"""Step probabilities by a process reward model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ssrctl.configs import CriticOptions, ModelConfig
from ssrctl.critics.prm.styles import STYLES, Encoded, Encoder, Style, detect_style
from ssrctl.errors import UserError
from ssrctl.models.loading import load_model, read_config

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.models.loading import LoadedModel


class LocalScorer:
    """A loaded process reward model.

    Args:
        options: model, style, step tag, dtype and batch size.
        device: as ``--device``.

    Raises:
        UserError: the model cannot be loaded, is of another kind than its style needs, or has no token for the tag.

    Attributes:
        identity: everything that the probabilities depend on.
        context_length: maximum number of tokens; None if the config names none.
    """

    def __init__(self, options: CriticOptions, device: str) -> None:
        assert options.critic_model is not None
        config = ModelConfig(model=options.critic_model, dtype=options.critic_dtype, device=device)
        style = style_of(options, config)
        self.loaded: LoadedModel = load_model(config, kind=_model_class(style))
        self.encoder = Encoder(style, self.loaded.tokenizer, options.critic_model, options.critic_prm_step_tag)
        self.context_length = self.loaded.context_length
        self._batch_size = options.critic_batch_size
        labels = getattr(self.loaded.model.config, "num_labels", 2)
        if not style.candidates and labels != 2:
            raise UserError(
                f"{options.critic_model} has {labels} labels, a process reward model of the style {style.name} has 2",
                "name another model with --critic-model",
            )
        self.identity = (
            f"{self.loaded.identity.fingerprint} {self.loaded.model.dtype} {style.name} {self.encoder.tag!r}"
        )

    def probabilities(self, inputs: Sequence[Encoded]) -> list[list[float]]:
        """Return the probability that each step is right, in [0, 1]; in batches of similar lengths.

        Args:
            inputs: within the context, each with at least one place.
        """
        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index].ids))
        found: dict[int, list[float]] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            found.update(zip(batch, self._forward([inputs[index] for index in batch]), strict=True))
        return [found[index] for index in range(len(inputs))]

    def close(self) -> None:
        """Do nothing: the model goes with its last reference."""

    def _forward(self, batch: Sequence[Encoded]) -> list[list[float]]:
        import torch

        width = max(len(one.ids) for one in batch)
        ids = torch.full((len(batch), width), self.loaded.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):  # padding on the right, after everything that a place reads
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
        rows = torch.tensor([row for row, one in enumerate(batch) for _ in one.places])
        places = torch.tensor([place for one in batch for place in one.places])
        with torch.inference_mode():
            logits = self._logits(ids.to(self.loaded.device), mask.to(self.loaded.device), rows, places)
        # [N, 2], the right class first
        right = self.encoder.candidates or [1, 0]
        shares = logits[:, right].float().softmax(dim=-1)[:, 0].cpu()
        if not bool(shares.isfinite().all()):
            raise UserError("the process reward model gives no finite scores", "use --critic-dtype float32")
        found = iter(shares.tolist())
        return [[next(found) for _ in one.places] for one in batch]

    def _logits(self, ids: Tensor, mask: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Return the logits ``[N, labels or vocabulary]`` at the positions ``(rows[n], places[n])``."""
        import inspect

        model = self.loaded.model
        columns = places
        settings: dict[str, Any] = {}
        if self.encoder.candidates and "logits_to_keep" in inspect.signature(model.forward).parameters:
            # A vocabulary of 128k makes a gigabyte of logits for every few thousand tokens.
            kept, columns = places.unique(return_inverse=True)
            settings["logits_to_keep"] = kept.to(ids.device)
        if "use_cache" in inspect.signature(model.forward).parameters:
            settings["use_cache"] = False
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **settings).logits
        return logits[rows.to(ids.device), columns.to(ids.device)]


def style_of(options: CriticOptions, config: ModelConfig) -> Style:
    """Return the style that is given, or the one that the model's architecture allows."""
    if options.critic_prm_style != "auto":
        return STYLES[options.critic_prm_style]
    return detect_style(read_config(config).architectures or (), config.model)


def _model_class(style: Style) -> Any:
    """Return the class of a style's models."""
    import transformers

    if style.candidates:
        return transformers.AutoModelForCausalLM
    if style.name == "trl":
        return transformers.AutoModelForTokenClassification
    from ssrctl.critics.prm.step_head import StepHeadModel

    return StepHeadModel
