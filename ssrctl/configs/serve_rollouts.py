"""Settings of `ssrctl serve-rollouts`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import AtLeastOne, Positive, allows_code
from ssrctl.configs.common import TINY, CommonConfig
from ssrctl.configs.engines import DEFAULT_SERVER, check_server


@dataclass(kw_only=True)
class ServeRolloutsConfig(CommonConfig):
    """Start a vLLM server that takes the weights of `ssrctl train --rollout-engine vllm-server`, and end it with the run.

    vLLM has an environment of its own, with this package's plugin in it: pip install --no-deps ssrctl.

    Example: ssrctl serve-rollouts --model MODEL --python /opt/vllm/bin/python -- ssrctl train --model MODEL
    --rollout-engine vllm-server
    """

    model: str = TINY
    """Model name on the hub or local folder, as in `ssrctl train`."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in, which has to be that of the training. auto: bfloat16 on CUDA, float32 on a CPU."""

    trust_remote_code: bool = allows_code(False)
    """Run python code that the model's folder contains. Only for models that you trust."""

    python: str = allows_code("python3")
    """Python of the environment that has vLLM and this package's plugin."""

    url: str = DEFAULT_SERVER
    """Address to listen on. Whoever reaches it can change the server's weights."""

    timeout: Positive = 600.0
    """Seconds until the server has to answer."""

    kv_cache_gib: AtLeastOne = 1
    """On a CPU: memory for keys and values, in GiB."""

    log: Path | None = None
    """File for the server's output; stderr by default."""

    vllm_arg: list[str] = field(default_factory=list, metadata={"allows_code": True})
    """Further argument of the server, such as --vllm-arg=--max-model-len=4096; give the flag again for several."""

    command: list[str] = field(default_factory=list, metadata={"metavar": "[-- COMMAND ...]", "allows_code": True})
    """Command to run beside the server, which ends with it; without one it runs until Ctrl-C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server("--url", self.url)
