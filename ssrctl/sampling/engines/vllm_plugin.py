"""The plugin of vLLM (entry point ``vllm.general_plugins``) that lets a server take the pushes of ``ssrctl train``.

vLLM loads it in each of its processes, before a model. Install it in vLLM's environment with
``pip install --no-deps ssrctl``: the engine's side needs torch, safetensors and vLLM only.
"""

from __future__ import annotations

import contextlib
import os

BACKEND = "ssrctl"


def register() -> None:
    """Register the backend for weight transfers; calling it again changes nothing.

    Where the server takes weights at all (its dev mode), layers on a CPU are kept from multiplying by packed copies: an
    update would leave these as they were, and no checksum of the weights would differ.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # registered before: vLLM may load a plugin several times
        WeightTransferEngineFactory.register_engine(BACKEND, "ssrctl.sampling.engines.vllm_backend", "PushedWeights")
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from vllm import _custom_ops

            _custom_ops._supports_onednn = False
