"""The worker's side of a push: vLLM's weights follow the trainer's.

Changed entries go through the loaders of vLLM's models, which know fused layouts and tensor parallelism; whole tensors go
through its layerwise reload. Each worker knows the version that it holds and refuses changes to another one.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from ssrctl.sampling.engines.nearest import marked, place_tails
from ssrctl.sampling.engines.push_bytes import TensorChanges, from_bytes, from_file, unpacked_changes


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing: a push needs no connection of its own."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One push.

    Attributes:
        version: of the weights after it.
        base: the version that the changes are to be made to; None for a push of whole tensors.
        path: of the file with its bytes.
        data: else the bytes, in base64.
    """

    version: str
    base: str | None = None
    path: str | None = None
    data: str | None = None


class PushedWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The backend ``ssrctl``."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._version: str | None = None
        self._reloading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to nothing."""

    def start_weight_update(self) -> None:
        """Wait for the push, which says whether it reloads."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Apply a push.

        Raises:
            ValueError: changes to another version than the one held.
        """
        base, held = update_info.base, self._version
        if base is not None and base != held:
            raise ValueError(f"the push changes version {base} of the weights, this worker holds {held}")
        if update_info.path is not None:
            tensors, metadata = from_file(update_info.path)
        else:
            tensors, metadata = from_bytes(base64.b64decode(update_info.data or ""))
        self._version = None  # half applied until the end
        if base is None:
            self._reloading = True
            initialize_layerwise_reload(self.model)
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in tensors.items())
        else:
            self._apply(unpacked_changes(tensors, metadata))
        self._version = update_info.version

    def _apply(self, changes: Sequence[TensorChanges]) -> None:
        """Write changed entries: those near the weights here by their tails, the others by vLLM's checkpoint patches."""
        near = [one for one in changes if one.near[0].numel()]
        tensors = (
            (one.name, marked(one.shape, one.dtype, *(part.to(self.device) for part in one.near))) for one in near
        )
        plain = Tensor.copy_

        def copy_(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if destination.shape != source.shape:
                raise NotImplementedError(f"a loader copies {tuple(source.shape)} into {tuple(destination.shape)}")
            place_tails(destination, source)
            return destination

        with torch.no_grad():
            Tensor.copy_ = copy_  # type: ignore[method-assign, assignment]
            try:
                if near:
                    self.model.load_weights(tensors)
            finally:
                Tensor.copy_ = plain  # type: ignore[method-assign]
        patches = [
            CheckpointWeightPatch(
                one.name, one.shape, one.dtype, one.far[1].to(self.device), one.far[0].to(self.device)
            )
            for one in changes
            if one.far[0].numel()
        ]
        load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)

    def finish_weight_update(self) -> None:
        """Finish a reload."""
        if self._reloading:
            self._reloading = False
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Release nothing."""
