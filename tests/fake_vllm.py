"""A stand-in for a vLLM server: the routes that the client uses, over the bundled model, with faults on demand.

The backend is the real one (``vllm_backend``), on stubs of the few names of vLLM that it builds on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import torch

from ssrctl.configs import SamplingConfig
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.engines.base import Request
from ssrctl.sampling.engines.transformers_engine import TransformersEngine

A, B = TypeVar("A"), TypeVar("B")


class StubTransfer(Generic[A, B]):
    """vLLM's base class of backends, as far as it matters."""

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.device, self.model, self.model_config = device, model, None

    def update_weights(self, update: dict[str, Any]) -> None:
        self.receive_weights(self.update_info_cls(**update))  # type: ignore[attr-defined]


@dataclasses.dataclass
class StubPatch:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def load_patches(model: Any, patches: list[StubPatch], *, validate_unique_indices: bool) -> None:
    for patch in patches:
        assert patch.shape == tuple(model.weights[patch.name].shape)
        model.weights[patch.name].view(-1)[patch.indices] = patch.values


class Weights:
    """A model as vLLM's loaders see it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights = {name: p.data for name, p in module.named_parameters()}

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.weights[name].copy_(tensor)


def backend(module: torch.nn.Module) -> Any:
    """The real backend over a model."""
    stubs = {
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": StubTransfer, "WeightTransferInitInfo": object, "WeightTransferUpdateInfo": object,
        },
        "vllm.model_executor.model_loader.checkpoint_weight_patch": {
            "CheckpointWeightPatch": StubPatch, "load_checkpoint_weight_patches": load_patches,
        },
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: None, "finalize_layerwise_reload": lambda model, config: None,
        },
    }  # fmt: skip
    names = {".".join(name.split(".")[:end]) for name in stubs for end in range(1, 6)}
    made = {name: types.ModuleType(name) for name in names | set(stubs)}
    for name, contents in stubs.items():
        vars(made[name]).update(contents)
    try:
        sys.modules.update(made)
        real = importlib.import_module("ssrctl.sampling.engines.vllm_backend")
    finally:
        for name in made:
            del sys.modules[name]
    return real.PushedWeights(None, None, torch.device("cpu"), Weights(module))


class FakeVllm:
    """A server of the weights in ``loaded``, whose copy it samples with.

    Attributes:
        faults: of a route's path: the number of its next requests that fail.
        requests: (path, body) of every request.
        ignores_changes: True for a server that takes pushes of changes and does not apply them.
        gives_out: after this many more responses the server dies; None never.
    """

    def __init__(self, loaded: LoadedModel, **settings: Any) -> None:
        self._original = loaded
        self.settings: dict[str, Any] = {
            "version": "0.32.0",
            "backend": "ssrctl",
            "dtype": "torch.float32",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": loaded.context_length,
            "dev_mode": True,
            "scale_out": True,
        } | settings
        self.faults: dict[str, int] = {}
        self.requests: list[tuple[str, Any]] = []
        self.ignores_changes = self.drops_logprobs = False
        self.gives_out: int | None = None
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Begin from the original weights, as after a kill."""
        self.loaded = dataclasses.replace(self._original, model=copy.deepcopy(self._original.model))
        self.backend = backend(self.loaded.model)
        self.version, self.paused, self.updating = "default", False, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """Listen, and yield the address."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def answer(self, body: Any) -> None:
                with fake._lock:
                    status, reply = fake.reply(self.path, body)
                if status == 0:
                    self.close_connection = True
                    return
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def reply(self, target: str, body: Any) -> tuple[int, Any]:
        """Return (status, reply); status 0 breaks the connection."""
        path = urlsplit(target).path
        self.requests.append((path, body))
        if self.gives_out is not None and self.gives_out <= 0:
            return 0, None
        if self.faults.get(path, 0):
            self.faults[path] -= 1
            return 500, {"error": f"a fault of {path}"}
        if path not in ("/health", "/version", "/inference/v1/generate") and not self.settings["dev_mode"]:
            return 404, {"detail": "Not Found"}
        try:
            return 200, self.routes[path](self, body)
        except ValueError as error:
            return 500, {"error": str(error)}
        except PermissionError as error:
            return 403, {"error": str(error)}

    def health(self, body: Any) -> Any:
        return {}

    def version_(self, body: Any) -> Any:
        return {"version": self.settings["version"]}

    def server_info(self, body: Any) -> Any:
        model = {key: self.settings[key] for key in ("dtype", "logprobs_mode", "max_model_len")}
        transfer = self.settings["backend"] and {"backend": self.settings["backend"]}
        return {
            "vllm_config": {
                "model_config": model,
                "weight_transfer_config": transfer,
                "cache_config": {"block_size": 32},
                "device_config": {"device": "cpu"},
            }
        }

    def pause(self, body: Any) -> Any:
        self.paused = True
        return {"status": "paused"}

    def resume(self, body: Any) -> Any:
        self.paused = False
        return {"status": "resumed"}

    def start_weight_update(self, body: Any) -> Any:
        if self.updating:
            raise ValueError("a weight update is already active")
        self.updating = True
        self.backend.start_weight_update()
        return {}

    def update_weights(self, body: Any) -> Any:
        assert self.paused and self.updating
        update = body["update_info"]
        if self.ignores_changes and update["base"] is not None:
            self.backend._version = update["version"]
            return {}
        try:
            self.backend.update_weights(update)
        except ValueError:
            self.updating = False
            raise
        return {}

    def finish_weight_update(self, body: Any) -> Any:
        if not self.updating:
            raise ValueError("no weight update is active")
        self.backend.finish_weight_update()
        self.updating = False
        self.version = body.get("weight_version", self.version)
        return {}

    def reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def weight_info(self, body: Any) -> Any:
        return {"weight_version": self.version}

    def inference_v1_generate(self, body: Any) -> Any:
        if not self.settings["scale_out"]:
            raise PermissionError("Scale-out endpoints are disabled")
        assert not self.paused
        params = body["sampling_params"]
        sampling = SamplingConfig(temperature=params["temperature"], top_p=params["top_p"], top_k=params["top_k"])
        request = Request(body["token_ids"], params["max_tokens"], params["seed"])
        ((_, sample),) = TransformersEngine(self.loaded, sampling).sample([request])
        logprobs = [
            {"token_id": t, "logprob": x} for t, x in zip(sample.response_ids, sample.logprobs.tolist(), strict=True)
        ]
        if self.drops_logprobs:
            logprobs[0]["logprob"] = -9999.0
        if self.gives_out is not None:
            self.gives_out -= 1
        choice = {
            "token_ids": sample.response_ids,
            "logprobs": {"content": logprobs},
            "finish_reason": sample.finish_reason,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(sample.response_ids)}],
        }
        return {"choices": [choice]}

    routes = {  # noqa: RUF012
        "/health": health,
        "/version": version_,
        "/server_info": server_info,
        "/pause": pause,
        "/resume": resume,
        "/start_weight_update": start_weight_update,
        "/update_weights": update_weights,
        "/finish_weight_update": finish_weight_update,
        "/reset_prefix_cache": reset_prefix_cache,
        "/weight_info": weight_info,
        "/inference/v1/generate": inference_v1_generate,
    }
