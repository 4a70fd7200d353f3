"""Requests to a server that the user runs: json there and back, with the user's key."""

from __future__ import annotations

import http.client
import json
import urllib.request
from typing import Any, Literal

from ssrctl.configs.credentials import key_in
from ssrctl.configs.engines import KEY_VARIABLE

LONGEST_REPLY = 2**28  # bytes


class NoAnswer(Exception):
    """A server that is not there, or whose reply is late, breaks off or is not json.

    Attributes:
        kind: which of these.
    """

    def __init__(self, kind: Literal["connection", "timeout", "not json"], text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Refused(Exception):
    """A request that the server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Returns replies of every status, and follows no redirect, which would carry the key to another host."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


_OPENER = urllib.request.build_opener(_AnyStatus)
_DIRECT = urllib.request.build_opener(_AnyStatus, urllib.request.ProxyHandler({}))


def ask(url: str, body: Any = None, *, seconds: float, direct: bool = False) -> Any:
    """Return the parsed reply of a POST of ``body``, of a GET without one; an empty dict for an empty reply.

    Args:
        url: of the server and the route.
        body: anything that json can hold.
        seconds: longest wait for the connection, and for each part of the reply.
        direct: pass by the proxies of the environment.

    Raises:
        NoAnswer, Refused: as their classes say.
        UserError: the user's key cannot be sent.
    """
    headers = {"Content-Type": "application/json"}
    if key := key_in(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with (_DIRECT if direct else _OPENER).open(request, timeout=seconds) as reply:
            text = reply.read(LONGEST_REPLY)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise NoAnswer("timeout", "no reply in time") from error
        raise NoAnswer("connection", str(reason) or type(error).__name__) from error
    if reply.status >= 300:
        said = " ".join(text[:1000].decode("utf-8", "replace").split())
        raise Refused(reply.status, said[:300] or reply.reason)
    if reply.length:  # http.client reports the missing bytes by this only
        raise NoAnswer("connection", f"the reply breaks off after {len(text)} bytes")
    try:
        return json.loads(text) if text else {}
    except ValueError:
        raise NoAnswer("not json", "its reply is not json") from None
