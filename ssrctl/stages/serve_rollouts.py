"""`ssrctl serve-rollouts`: the vLLM server of a run, started right and ended with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssrctl.configs import TINY, ModelConfig
from ssrctl.configs.serve_rollouts import ServeRolloutsConfig
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.json_requests import NoAnswer, Refused
from ssrctl.models.loading import folder_of
from ssrctl.models.precision import settle_dtype
from ssrctl.sampling.engines.vllm_http import VllmServer
from ssrctl.sampling.engines.vllm_plugin import BACKEND

_END_SECONDS = 20.0
_POLL_SECONDS = 0.5
_ENTRY_POINTS = (
    "import importlib.util as u, importlib.metadata as m\n"
    "print(u.find_spec('vllm') is not None, any(e.name == 'ssrctl' for e in m.entry_points(group='vllm.general_plugins')))"
)


def run(config: ServeRolloutsConfig) -> dict[str, Any] | None:
    """Start the server, wait until it answers, and end it after the command, or on Ctrl-C.

    Returns:
        With ``--dry-run`` the command line; else None.

    Raises:
        UserError: no vLLM or no plugin in that environment, or a server that does not come up.
        SystemExit: the command failed; its exit code.
    """
    import torch

    server = VllmServer(config.url)
    variables, words = server_command(config, on_cpu=not torch.cuda.is_available())
    line = shlex.join([*(f"{key}={value}" for key, value in variables.items()), *words])
    if config.dry_run:
        plan = {"command": line}
        console.show_plan("server", plan)
        return plan
    _check_environment(config.python)
    if not server.is_local:
        console.warn(f"{config.url}: whoever reaches this address can change the server's weights")
    console.note(line)
    with contextlib.ExitStack() as stack:
        try:
            output: Any = sys.stderr if config.log is None else stack.enter_context(config.log.open("wb"))
        except OSError as error:
            raise UserError(f"--log {config.log} cannot be written: {error.strerror}", "name another file") from error
        process = stack.enter_context(_running(words, variables, output))
        _wait(server, process, config)
        console.note(f"the server answers at {config.url}")
        if not config.command:
            code = process.wait()
            raise UserError(f"the server ended with exit code {code}", _where(config))
        code = subprocess.run(config.command, check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 1)
    return None


def server_command(config: ServeRolloutsConfig, *, on_cpu: bool) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the words of the server's command line.

    The dev mode has the routes that update weights; the log-probabilities are those of the distribution that is sampled from.
    """
    address = urlsplit(config.url)
    model = settle_dtype(ModelConfig(model=config.model, revision=config.revision, dtype=config.dtype))
    local = config.model == TINY or Path(config.model).exists()
    words = [
        config.python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder_of(model)) if local else config.model,
        "--host", address.hostname or "", "--port", str(address.port or 80),
        "--dtype", model.dtype,
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out",
        "--weight-transfer-config", f'{{"backend": "{BACKEND}"}}',
    ]  # fmt: skip
    if config.revision is not None:
        words += ["--revision", config.revision]
    if config.trust_remote_code:
        words.append("--trust-remote-code")
    variables = {"VLLM_SERVER_DEV_MODE": "1"}
    if on_cpu:
        words.append("--enforce-eager")
        variables |= {"VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables, words + config.vllm_arg


def _check_environment(python: str) -> None:
    if shutil.which(python) is None:
        raise UserError(f"--python {python} is not a program", "name the Python of vLLM's environment")
    done = subprocess.run([python, "-c", _ENTRY_POINTS], capture_output=True, text=True, check=False)
    vllm, plugin = [*done.stdout.split(), "False", "False"][:2]
    if vllm != "True":
        raise UserError(f"{python} has no vLLM", "name the Python of vLLM's environment with --python")
    if plugin != "True":
        raise UserError(f"vLLM in {python} lacks ssrctl's plugin", f"{python} -m pip install --no-deps ssrctl")


@contextlib.contextmanager
def _running(words: list[str], variables: dict[str, str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in a process group of its own, so that its workers end with it."""
    process = subprocess.Popen(
        words, env=os.environ | variables, stdout=output.fileno(), stderr=output.fileno(), start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: VllmServer, process: subprocess.Popen[bytes], config: ServeRolloutsConfig) -> None:
    end = time.monotonic() + config.timeout
    while True:
        if process.poll() is not None:
            raise UserError(f"the server ended with exit code {process.returncode}", _where(config))
        with contextlib.suppress(NoAnswer, Refused):
            server.get("/health", seconds=10.0)
            return
        if time.monotonic() >= end:
            raise UserError(
                f"the server does not answer at {server.url} after {config.timeout:g} seconds",
                "give it longer with --timeout",
            )
        time.sleep(_POLL_SECONDS)


def _where(config: ServeRolloutsConfig) -> str:
    return "its output is above" if config.log is None else f"its output is in {config.log}"
