"""One running vLLM server, as its HTTP routes show it: generation from tokens, and the phases of a weight update.

The routes are those of vLLM 0.32 with ``--enable-scale-out`` and ``VLLM_SERVER_DEV_MODE=1``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
import urllib.parse
from typing import Any

from ssrctl.io.json_requests import Refused, ask

LONGEST_REQUEST = 3600.0  # seconds; a server that ends breaks the connection at once
_CACHE_TRIES = 20


class VllmServer:
    """A server at ``url``, which ``configs.engines.check_server`` has accepted.

    Attributes:
        url: without a slash at its end.
        held: label of the weights that it holds; None when that is not known.
        in_flight: requests that it is working on.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.held: str | None = None
        self.in_flight = 0

    @property
    def is_local(self) -> bool:
        """True if the address is this machine's own, which nobody else can reach."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def get(self, path: str, *, seconds: float = 60.0) -> Any:
        """Return the parsed reply of a GET.

        Raises:
            NoAnswer, Refused: as their classes say.
        """
        return ask(self.url + path, seconds=seconds, direct=True)

    def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float = LONGEST_REQUEST) -> Any:
        """Return the parsed reply of a POST.

        Raises:
            NoAnswer, Refused: as their classes say.
        """
        return ask(self.url + path, body or {}, seconds=seconds, direct=True)

    def push(self, update: dict[str, Any]) -> None:
        """Give the server new weights; requests in progress are aborted, and it computes with these weights afterwards.

        Args:
            update: for the backend (``vllm_backend.UpdateInfo``).

        Raises:
            NoAnswer, Refused: the push failed; the server may be paused, and holds no known weights.
        """
        self.held = None
        self.post("/pause?mode=abort")
        try:
            self.post("/start_weight_update")
        except Refused:  # a client that died has left an update open
            self.post("/finish_weight_update")
            self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": update})
        self.post("/finish_weight_update", {"weight_version": update["version"]})
        self._forget_cache()
        self.post("/resume")
        found = self.get("/weight_info").get("weight_version")
        if found != update["version"]:
            raise Refused(200, f"it holds version {found} of the weights after a push of {update['version']}")
        self.held = found

    def _forget_cache(self) -> None:
        """Drop the keys and values of earlier weights, which would be reused for prompts with the same beginning."""
        for _ in range(_CACHE_TRIES):
            if self.post("/reset_prefix_cache").get("success") is True:
                return
            time.sleep(0.1)
        raise Refused(200, "the prefix cache is still in use after the pause")
