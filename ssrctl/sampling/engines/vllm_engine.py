"""Sampling from running vLLM servers, whose weights follow the trainer's by pushes of what was written.

Every response says with which version of the weights its tokens were sampled; those of another version are dropped, its
server gets all weights again, and the requests are repeated once. Several processes sample from the same servers, each its
own requests; the main one pushes and probes.
"""

from __future__ import annotations

import base64
import contextlib
import math
import secrets
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ssrctl.checkpoints.stored_tensors import StoredTensors
from ssrctl.configs import ModelConfig, SamplingConfig
from ssrctl.configs.engines import DEFAULT_SERVER, RolloutOptions
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.world import ALONE, World
from ssrctl.errors import Stopped, UserError
from ssrctl.io import console
from ssrctl.io.json_requests import NoAnswer, Refused
from ssrctl.models.loading import LoadedModel, folder_of
from ssrctl.sampling.alignment import decode
from ssrctl.sampling.endings import StopTexts, end_token_ids
from ssrctl.sampling.engines.base import Changes, Probe, Push, Request, Sample, StaleSamples
from ssrctl.sampling.engines.probe import compare, gap_bound, probe_requests
from ssrctl.sampling.engines.push_bytes import num_bytes, packed_changes, to_bytes, to_file
from ssrctl.sampling.engines.vllm_http import VllmServer
from ssrctl.sampling.engines.vllm_plugin import BACKEND

TESTED = "0.32"  # releases of vLLM
FULL_ABOVE = 1 / 3  # share of the weights above which a push of all of them is cheaper
TAILS_ABOVE = 0.01  # share above which values come without their top byte, which takes the server a second pass
_MISSING = -9999.0  # vLLM's reply in place of a log-probability that is NaN or infinite
_SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class _Stale:
    """A response that is not one of the weights in force.

    Attributes:
        reason: of the version that it names, or of its end.
    """

    reason: str


class VllmServerEngine:
    """The engine ``vllm-server``.

    Args:
        loaded: the model in training, whose weights the servers follow.
        model: its name or folder, as the user gave it.
        sampling: settings of the sampling.
        options: addresses and waiting times.
        stored: the model's parameters as the tensors of its folder, by whose names vLLM knows them.
        world: the processes that share the servers; all call the methods that connect, push, heal and check.
        sharded: the model, where each process has a shard of it.

    Attributes:
        version: number of pushes so far.
        full_seconds: of the last push of all weights.
        probe: the last one.
        block_size: tokens of the largest block of the servers' caches, once connected.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: str,
        sampling: SamplingConfig,
        options: RolloutOptions,
        stored: StoredTensors,
        world: World = ALONE,
        sharded: ShardedModel | None = None,
    ) -> None:
        self.loaded, self.model, self.sampling, self.options = loaded, model, sampling, options
        self.stored, self.world, self.sharded = stored, world, sharded
        self.servers = [VllmServer(url) for url in options.rollout_server_url or [DEFAULT_SERVER]]
        first = world.rank % len(self.servers)  # the processes prefer different servers
        self._preferred = self.servers[first:] + self.servers[:first]
        self._choice = threading.Lock()
        self.version = 0
        # versions of another run are not taken for this one's
        self._run = world.on_main(lambda: secrets.token_hex(4))
        self._ends = end_token_ids(loaded)
        self._stops = StopTexts(loaded.tokenizer, sampling.stop)
        self._inline = options.rollout_push == "inline"
        if options.rollout_push == "auto":
            self._inline = not all(server.is_local for server in self.servers)
        self.block_size = 0
        self.full_seconds: float | None = None
        self.probe: Probe | None = None

    @property
    def full_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())

    def connect(self) -> None:
        """Wait for the servers, check that they can follow this model, and give them its weights.

        Raises:
            UserError: a server does not come up, lacks what a push needs, serves another model, or is not the same one
                for every process.
        """
        self.block_size = self.world.on_main(lambda: max(map(self._meet, self.servers)))
        try:
            self.push(None)
            self.check()
        except Stopped as error:
            raise UserError(error.message, f"start the server with `{self._command(self.servers[0])}`") from error
        if self.world.size > 1:
            self.world.together(self._check_reach)

    def _meet(self, server: VllmServer) -> int:
        """Wait for a server and check its settings; return the tokens of a block of its cache."""
        if reason := self._wait(server, self.options.rollout_server_timeout):
            raise UserError(f"no rollout server at {server.url}: {reason}", f"start one with `{self._command(server)}`")
        block_size = self._check_settings(server)
        if not server.is_local:
            console.warn(
                f"{server.url}: whoever reaches this address can change the server's weights; keep it on a network "
                "that only the trainer reaches"
            )
        return block_size

    def _check_reach(self) -> None:
        """Raise a UserError if an address is another server here than in the main process, which has given it weights."""
        for server in self.servers:
            try:
                found = server.get("/weight_info").get("weight_version")
            except (NoAnswer, Refused) as error:
                found = f"nothing ({error})"
            if found != self._label:
                raise UserError(
                    f"process {self.world.rank} finds {found} at {server.url}, process 0 gave it the weights {self._label}",
                    "give --rollout-server-url addresses that are the same server on every machine",
                )

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Sample]]:
        """Yield (place, sample) as responses end.

        Raises:
            StaleSamples: a server samples from other weights: after it got all of them again, or, in one of several
                processes, which can only ``heal`` it together, at once.
            Stopped: a server is gone.
            UserError: a server refuses a request.
        """
        missing = list(range(len(requests)))
        for last in (False, True) if self.world.size == 1 else (True,):
            stale: dict[int, str] = {}
            for place, outcome in self._answers(requests, missing):
                if isinstance(outcome, _Stale):
                    stale[place] = outcome.reason
                else:
                    yield place, outcome
            missing = sorted(stale)
            if not missing:
                return
            reason = f"{len(missing)} of {len(requests)} responses cannot be used: {stale[missing[0]]}"
            if last:
                raise StaleSamples(reason)
            self.heal(reason)

    def heal(self, reason: str) -> None:
        """Give all weights again to the servers that sampled from others, in any process.

        Raises:
            Stopped: a server is gone, or refuses them.
        """
        console.warn(f"{reason}; the server gets all weights again")
        stale = self.world.gather([place for place, server in enumerate(self.servers) if server.held != self._label])
        self._push_all(sorted({place for places in stale for place in places}))

    def push(self, changes: Changes | None, before: Mapping[str, Tensor] | None = None) -> Push:
        """Bring every server to the trainer's weights.

        Args:
            changes: the coordinates that differ from the push before; None for all weights. Those of the main process
                count.
            before: the values there at the push before; None sends whole values.

        Raises:
            Stopped: a server is gone, or refuses a push of all weights.
        """
        started = time.perf_counter()

        def wanted() -> tuple[int, bool]:
            if changes is None:
                return 0, True
            count = sum(indices.numel() for indices, _ in changes.values())
            return count, count > FULL_ABOVE * self.loaded.num_parameters

        count, full = self.world.on_main(wanted)
        if not count and not full:
            return Push("none", 0, 0, time.perf_counter() - started)
        base, self.version = self._label, self.version + 1
        sent, left = 0, list(range(len(self.servers)))
        if not full:
            sent, left = self.world.on_main(lambda: self._send_changes(changes or {}, before, base))
        if left:
            sent += self._push_all(left)
        self._all_hold()
        return Push("full" if left else "changes", count, sent, time.perf_counter() - started)

    def check(self) -> Probe:
        """Compare each server's log-probabilities of fixed prompts with the trainer's.

        Raises:
            Stopped: a server is gone, or its mean gap is above the bound of the dtype.
        """
        requests = probe_requests(self.loaded, self.block_size)
        drawn = self.world.on_main(lambda: [self._probed(server, requests) for server in self.servers])
        # a sharded model takes all processes
        probes = [compare(self.loaded, requests, samples, self.sampling.temperature) for samples in drawn]
        if self.sharded is not None:
            self.sharded.settle()
        self.probe = self.world.on_main(lambda: self._judged(probes))
        return self.probe

    def _probed(self, server: VllmServer, requests: Sequence[Request]) -> list[Sample]:
        samples = []
        for request in requests:
            outcome = self._one(request, server)
            if isinstance(outcome, _Stale):
                raise Stopped(f"the probe failed: {outcome.reason}")
            samples.append(outcome)
        return samples

    def _judged(self, probes: Sequence[Probe]) -> Probe:
        """Return the servers' probes as one, with the largest gaps."""
        bound = gap_bound(self.loaded.model.dtype)
        for server, probe in zip(self.servers, probes, strict=True):
            if probe.gap_mean > bound:
                raise Stopped(
                    f"{server.url} does not compute with the trainer's weights: the log-probabilities of fixed prompts are "
                    f"{probe.gap_mean:.2g} apart in the mean ({probe.gap_max:.2g} at most), rounding stays below {bound:g}"
                )
        answers = [answer for probe in probes for answer in probe.answers]
        return Probe(max(one.gap_mean for one in probes), max(one.gap_max for one in probes), answers)

    def close(self) -> None:
        """Hold nothing open: a server goes on without the trainer."""

    @property
    def _label(self) -> str:
        return f"{self._run}-{self.version}"

    def _weights(self) -> dict[str, Tensor]:
        """Return all weights by their names in the checkpoint, on the CPU, in the main process; all processes call it."""
        if self.sharded is not None:
            named = self.sharded.whole_weights()
        else:
            own = self.loaded.model.named_parameters() if self.world.is_main else ()
            named = {name: parameter.detach().cpu().contiguous() for name, parameter in own}
        return self.stored.tensors(named)

    def _all_hold(self) -> None:
        """Note, in every process, that the servers hold the weights in force."""
        for server in self.servers:
            server.held = self._label

    def _send_changes(self, changes: Changes, before: Mapping[str, Tensor] | None, base: str) -> tuple[int, list[int]]:
        """Push changes to the weights ``base``; return their bytes, and the servers that did not take them."""
        count = sum(indices.numel() for indices, _ in changes.values())
        if before is not None and count <= TAILS_ABOVE * self.loaded.num_parameters:
            before = None
        if before is not None:
            old = {name: (indices, before[name]) for name, (indices, _) in changes.items()}
            before = {name: values for name, (_, values) in self.stored.changes(old).items()}
        tensors, metadata = packed_changes(self.stored.changes(changes), self.stored.shapes, before)
        with self._carried(tensors, metadata) as cargo:
            update = {"base": base, "version": self._label, **cargo}
            left = [n for n, s in enumerate(self.servers) if s.held != base or not self._took(s, update)]
        return num_bytes(tensors) * len(self.servers), left

    def _took(self, server: VllmServer, update: dict[str, Any]) -> bool:
        """Push changes; False, with a warning, if the server did not take them."""
        try:
            server.push(update)
        except (NoAnswer, Refused) as error:
            console.warn(f"{server.url} did not take a push of changes ({error}); it gets all weights")
            return False
        return True

    def _push_all(self, places: Sequence[int]) -> int:
        """Push all weights to the servers at ``places``; return their bytes."""
        started = time.perf_counter()
        tensors = self._weights()
        self.world.on_main(lambda: self._send_all(tensors, [self.servers[place] for place in places]))
        self._all_hold()
        self.full_seconds = time.perf_counter() - started
        return self.full_bytes * len(places)

    def _send_all(self, tensors: Mapping[str, Tensor], servers: Sequence[VllmServer]) -> None:
        with self._carried(tensors, {}) as cargo:
            update = {"base": None, "version": self._label, **cargo}
            for server in servers:
                try:
                    self._patiently(server, lambda server=server: server.push(update))  # type: ignore[misc]
                except Refused as error:
                    raise Stopped(f"{server.url} does not take the weights: {error}") from error

    @contextlib.contextmanager
    def _carried(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Yield the fields of the update that carry a push: its bytes, or the path of a file while it is there."""
        if self._inline:
            yield {"data": base64.b64encode(to_bytes(tensors, metadata)).decode()}
            return
        room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * num_bytes(tensors)
        with tempfile.TemporaryDirectory(prefix="ssrctl-push-", dir=_SHARED_MEMORY if room else None) as folder:
            path = Path(folder) / "push.safetensors"
            to_file(path, tensors, metadata)
            yield {"path": str(path)}

    def _patiently(self, server: VllmServer, call: Callable[[], T]) -> T:
        """Call; where the server is gone, wait as long as the settings say, and call again once.

        Raises:
            Stopped: it does not come back.
        """
        try:
            return call()
        except NoAnswer as error:
            reason = str(error)
        seconds = self.options.rollout_server_return
        if seconds:
            console.warn(
                f"the rollout server {server.url} is gone ({reason}); waiting up to {seconds:g} seconds for it"
            )
            if not self._wait(server, seconds):
                with contextlib.suppress(NoAnswer):
                    return call()
        raise Stopped(f"the rollout server {server.url} is gone: {reason}; start it with `{self._command(server)}`")

    def _wait(self, server: VllmServer, seconds: float) -> str | None:
        """Wait until a server is up; return the last reason if it is not."""
        end = time.monotonic() + seconds
        while True:
            try:
                server.get("/health", seconds=10.0)
                return None
            except (NoAnswer, Refused) as error:
                reason = str(error)
            if time.monotonic() >= end:
                return f"{reason} (waited {seconds:g} seconds)"
            time.sleep(_POLL_SECONDS)

    def _check_settings(self, server: VllmServer) -> int:
        """Return the tokens of a block of a server's cache.

        Raises:
            UserError: it cannot follow this model, with the command that starts one that can.
        """
        fix = f"start it with `{self._command(server)}`"
        try:
            version = str(server.get("/version").get("version", ""))
            info = server.get("/server_info?config_format=json")["vllm_config"]
            model, transfer = info["model_config"], info["weight_transfer_config"] or {}
            block_size = int(info["cache_config"]["block_size"])
            longest, kind, mode = int(model["max_model_len"]), str(model["dtype"]), str(model["logprobs_mode"])
            on_cpu = info["device_config"]["device"] == "cpu"
        except (NoAnswer, Refused) as error:
            raise UserError(f"{server.url} is not a vLLM server in dev mode: {error}", fix) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{server.url} describes itself in another way than vLLM {TESTED}: {error!r}", fix
            ) from error
        if on_cpu and any(".experts." in name for name in self.stored.shapes):
            raise UserError(
                f"{server.url} runs on a CPU, where vLLM {TESTED} multiplies experts by packed copies that no push reaches",
                "use a server on a GPU, or --rollout-engine transformers",
            )
        ours = str(self.loaded.model.dtype).removeprefix("torch.")
        needed = self.loaded.context_length or longest
        problems = {
            f"its weight transfer is {transfer.get('backend')}, not that of ssrctl's plugin": transfer.get("backend")
            != BACKEND,
            f"it computes in {kind}, the trainer in {ours}": ours not in kind,
            f"its log-probabilities are {mode}, not of the distribution that it samples from": not mode.endswith(
                "processed_logprobs"
            )
            and self.sampling.temperature != 1.0,
            f"its context is {longest} tokens, the model's {needed}": longest < needed,
        }
        for problem, found in problems.items():
            if found:
                raise UserError(f"{server.url}: {problem}", fix)
        if not version.startswith(f"{TESTED}."):
            console.warn(f"{server.url} runs vLLM {version}; pushes were tested with {TESTED}")
        return block_size

    def _command(self, server: VllmServer) -> str:
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        port = "" if server.url == DEFAULT_SERVER else f" --url {server.url}"
        return f"ssrctl serve-rollouts --model {shlex.quote(self.model)} --dtype {dtype}{port}"

    def _answers(self, requests: Sequence[Request], places: Sequence[int]) -> Iterator[tuple[int, Sample | _Stale]]:
        """Yield (place, outcome) as the servers reply."""
        with ThreadPoolExecutor(max(1, min(len(places), self.sampling.sampling_batch_size))) as pool:
            try:
                futures = {pool.submit(self._one, requests[place]): place for place in places}
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, request: Request, probed: VllmServer | None = None) -> Sample | _Stale:
        """Ask the server with the fewest requests; for a probe ``probed``, without top-p, top-k and stop texts."""
        with self._choice:
            server = probed or min(self._preferred, key=lambda one: one.in_flight)
            server.in_flight += 1
        try:
            reply = server.post("/inference/v1/generate", self._body(request, plain=probed is not None))
        except NoAnswer as error:
            if not self.options.rollout_server_return:
                raise Stopped(
                    f"the rollout server {server.url} is gone: {error}; start it with `{self._command(server)}`"
                ) from error
            server.held = None
            return _Stale(f"{server.url} is gone ({error})")
        except Refused as error:
            raise UserError(
                f"{server.url} refuses to sample: {error}", f"start it with `{self._command(server)}`"
            ) from error
        finally:
            with self._choice:
                server.in_flight -= 1
        return self._sample(server, reply, request, plain=probed is not None)

    def _body(self, request: Request, *, plain: bool) -> dict[str, Any]:
        sampling = self.sampling
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": 1.0 if plain else sampling.top_p,
            "top_k": 0 if plain else sampling.top_k,
            "max_tokens": request.limit,
            "seed": request.seed,
            "logprobs": 0,
            "stop_token_ids": self._ends,
            "ignore_eos": True,  # the end tokens are ours
            "detokenize": bool(sampling.stop) and not plain,
        }
        if sampling.stop and not plain:
            params |= {"stop": list(sampling.stop), "skip_special_tokens": False}
        return {"token_ids": list(request.ids), "sampling_params": params}

    def _sample(self, server: VllmServer, reply: Any, request: Request, *, plain: bool) -> Sample | _Stale:
        try:
            (choice,) = reply["choices"]
            ids = [int(token) for token in choice["token_ids"]]
            logprobs = [float(one["logprob"]) for one in choice["logprobs"]["content"]]
            versions = {str(span["version"]) for span in choice["weight_versions"]}
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{server.url} replies in another way than vLLM {TESTED}: {error!r}",
                f"start it with `{self._command(server)}`",
            ) from error
        if reason not in ("stop", "length"):
            server.held = None
            return _Stale(f"{server.url} ended one with {reason!r}")
        if versions != {self._label}:
            server.held = None
            found = ", ".join(sorted(versions)) or "none"
            return _Stale(f"{server.url} sampled with version {found} of the weights, {self._label} is in force")
        if len(logprobs) != len(ids) or not 0 < len(ids) <= request.limit:
            raise UserError(
                f"{server.url} replied with {len(ids)} tokens and {len(logprobs)} log-probabilities to a request for up "
                f"to {request.limit}",
                f"start it with `{self._command(server)}`",
            )
        cut = None
        if not plain:
            cut = next((end for end in range(1, len(ids) + 1) if self._stops.completed(ids[:end])), None)
        ids = ids[:cut]
        finish: Literal["stop", "length"] = "stop" if cut or ids[-1] in self._ends else "length"
        # those of top-p and top-k are of another distribution than the one that a sample's are defined for
        biased = not plain and (self.sampling.top_p < 1.0 or self.sampling.top_k > 0)
        known = [math.nan if biased or one <= _MISSING else one for one in logprobs[: len(ids)]]
        stopped = finish == "stop" and ids[-1] not in self._ends
        return Sample(ids, torch.tensor(known), decode(self.loaded.tokenizer, ids), finish, self.version, stopped)


def served_engine(
    config: RolloutOptions, loaded: LoadedModel, world: World = ALONE, sharded: ShardedModel | None = None
) -> VllmServerEngine | None:
    """Return the engine that the settings of a command name, not yet connected; None for transformers in this process.

    Args:
        config: settings of the engine, of the model and of sampling.
        loaded: the model.
        world: the processes that share the servers; all call this.
        sharded: the model, where each of them has a shard of it.

    Raises:
        UserError: a model whose parameters cannot be found in its folder.
    """
    if config.rollout_engine == "transformers":
        return None
    assert isinstance(config, SamplingConfig) and isinstance(config, ModelConfig)
    try:
        stored = StoredTensors.of(folder_of(config), loaded.shapes())
    except ValueError as error:
        raise UserError(f"{error}, and a push is by the names there", "use --rollout-engine transformers") from error
    return VllmServerEngine(loaded, config.model, config, config, stored, world, sharded)


def connected_engine(config: RolloutOptions, loaded: LoadedModel, world: World = ALONE) -> VllmServerEngine | None:
    """Return the same for a model whose weights stay as they are: the servers have them."""
    engine = served_engine(config, loaded, world)
    if engine is not None:
        engine.connect()
    return engine
