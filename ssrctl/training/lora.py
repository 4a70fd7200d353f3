"""LoRA through peft: adapters in the layers of a model, trained in place of its own weights (Hu et al. 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ssrctl.checkpoints.delta import check_base
from ssrctl.checkpoints.run_dir import Adapter, Checkpoint
from ssrctl.configs import TrainConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError, first_line
from ssrctl.models.loading import LoadedModel
from ssrctl.training.updaters.adamw import DenseChanges
from ssrctl.training.updaters.base import Changes

NAME = "default"  # peft's for a model's first adapter


@dataclass(frozen=True)
class AdaptedModel(LoadedModel):
    """A model with LoRA adapters, its only trainable parameters; those of half-precision weights are float32.

    Shapes and counts are those of the model's own parameters, by the names that they have without adapters.

    Attributes:
        own: the model's own parameters.
        layers: peft's layer with the adapter, by the name of the weight that it adapts.
        wrapped: the ``PeftModel`` around ``model``.
    """

    own: Mapping[str, torch.nn.Parameter]
    layers: Mapping[str, Any]
    wrapped: Any

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.own.items()}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.own.values())

    @property
    def num_trained(self) -> int:
        """The number of the adapters' parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def changes(self) -> Changes:
        """Return the adapted weights with their adapters merged, W + (alpha / r) B A rounded once to the dtype of W."""
        return DenseChanges(list(self.layers), self._merged, {})

    @torch.no_grad()
    def _merged(self, name: str) -> Tensor:
        """Return one, to the bit as peft's ``merge_and_unload`` makes it."""
        weight = self.own[name]
        change: Tensor = self.layers[name].get_delta_weight(NAME)
        return (weight + change).to(weight.dtype)

    def adapter(self) -> Adapter:
        """Return what peft's ``save_pretrained`` writes, the sets of its config sorted."""
        config = self.wrapped.peft_config[NAME].to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return Adapter(self._tensors(), plain)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the adapters of a checkpoint.

        Raises:
            UserError: it belongs to another model, or holds other adapters.
        """
        from peft import set_peft_model_state_dict

        check_base(checkpoint.delta, self.identity.fingerprint)
        found, ours = ({name: t.shape for name, t in some.items()} for some in (checkpoint.adapter, self._tensors()))
        if found != ours:
            raise UserError(
                f"{checkpoint.path} holds {len(found)} tensors of adapters, not the {len(ours)} of this run",
                "use another checkpoint",
            )
        set_peft_model_state_dict(self.wrapped, checkpoint.adapter)

    def _tensors(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        return found


def check_peft() -> None:
    """Raise a UserError if peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"--lora-r needs peft: {first_line(error)}", "pip install 'ssrctl[lora]'") from error


def add_adapters(loaded: LoadedModel, config: TrainConfig) -> AdaptedModel:
    """Put adapters into the layers of a model, in place, and freeze its own weights.

    B starts at 0 and A is random, by the run's seed, so the model computes as before.

    Raises:
        UserError: a name of ``--lora-target-modules`` that no layer has, or layers that cannot have adapters; peft names
            none for the architecture.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    model, named = loaded.model, config.lora_target_modules
    own = dict(model.named_parameters())
    assert config.lora_r is not None
    wanted = "all-linear" if named == ["all-linear"] else named or None
    settings = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=wanted, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "lora"))
            wrapped = wrap(model, settings, loaded.identity.revision)
    except ValueError as error:
        raise UserError(
            f"peft cannot adapt {loaded.identity.name}: {first_line(error)}",
            "name the layers with --lora-target-modules, or all-linear",
        ) from error
    model.eval()
    adapted = wrapped.targeted_module_names
    if odd := [name for name in named if wanted == named and not any(_is_called(one, name) for one in adapted)]:
        raise UserError(
            f"--lora-target-modules: no layer is called {odd[0]!a}",
            f"name layers that it has, such as {adapted[0].split('.')[-1]}",
        )
    names, layers = {id(parameter): name for name, parameter in own.items()}, {}
    for place, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        # a head may be the embedding too, and peft takes more than the linear layers that are asked for
        if not _is_linear(base) or layer is model.get_output_embeddings():
            raise UserError(
                f"peft would adapt {place} ({type(base).__name__}); adapters are for linear layers, without the output head",
                "name others with --lora-target-modules, such as q_proj",
            )
        layers[names[id(base.weight)]] = layer
    return AdaptedModel(
        model, loaded.tokenizer, loaded.identity, loaded.context_length, own=own, layers=layers, wrapped=wrapped
    )


def wrap(model: Any, settings: Any, revision: str | None = None) -> Any:
    """Return peft's ``get_peft_model``, without warnings of what peft corrects itself or ``add_adapters`` refuses."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        for about in ("fan_in_fan_out is set", "`is_gradient_checkpointing`", "Model .* `tie_word_embeddings=True`"):
            warnings.filterwarnings("ignore", about)
        return get_peft_model(model, settings, revision=revision)


@torch.no_grad()
def _is_linear(layer: torch.nn.Module) -> bool:
    """Return True for linear layers: fused experts are others, and routers may be linear by class only."""
    if not isinstance(layer, torch.nn.Linear):
        return isinstance(layer, Conv1D)
    plain = type(layer).forward is torch.nn.Linear.forward
    return plain or isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
