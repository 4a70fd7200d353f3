"""Failures of requests to a judge: their class, and whether they may have been billed and are worth a retry.

litellm reports a server's 500, a closed connection and an unreadable body alike, as an InternalServerError with
status 500. The underlying errors, which it keeps as cause or context, tell them apart.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ssrctl.configs.credentials import KEY_TEXT

MAX_DETAIL_CHARS = 200
MIN_SECRET_CHARS = 6  # shorter values of variables named like secrets ("true", "none") are not secrets

Kind = Literal[
    "timeout",
    "rate_limit",
    "connection",
    "api_error",
    "bad_request",
    "context_window",
    "content_filter",
    "empty_reply",
    "thinking_cut",
]
Refusal = Literal["key", "access", "model", "credit"]
# Gateways' timeouts: the model behind may have finished and been billed, though its reply was lost.
TIMEOUT_STATUSES = frozenset({408, 504, 524})
TRANSIENT_STATUSES = frozenset({409, 425, 429}) | TIMEOUT_STATUSES
KINDS: dict[int, Kind] = {413: "context_window", 429: "rate_limit", **dict.fromkeys(TIMEOUT_STATUSES, "timeout")}
REFUSALS: dict[int, Refusal] = {401: "key", 402: "credit", 403: "access", 404: "model"}
NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


class CallFailed(Exception):
    """A prompt for which no model gave a usable reply.

    Args:
        kind: class of the failure.
        may_be_billed: whether any of its requests may have cost money.
        detail: the provider's message, for people to read, without keys; may be empty.
    """

    def __init__(self, kind: Kind, *, may_be_billed: bool, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.may_be_billed = may_be_billed
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The failure of one request.

    Attributes:
        kind: its class.
        may_be_billed: False only where the provider certainly did not bill: a status of failure, nothing sent.
        transient: whether the same request may succeed later.
        reached: whether the server was reached at all.
        refused: the reason of a refusal that other requests will probably meet too: the key, the access that it
            gives, the model's name, exhausted credit.
        retry_after: seconds that the server asked to wait.
        detail: the provider's message, without keys.
    """

    kind: Kind
    may_be_billed: bool
    transient: bool
    reached: bool = True
    refused: Refusal | None = None
    retry_after: float | None = None
    detail: str = ""


def classify_failure(error: BaseException) -> Failure:
    """Return the failure behind an exception of litellm's or a TimeoutError of our own."""
    import aiohttp
    import httpx
    import openai
    from litellm import exceptions

    chain = _chain(error)
    detail = _detail(chain)
    status, headers, code = _reply(chain)
    if isinstance(error, exceptions.ContextWindowExceededError):
        return Failure(kind="context_window", may_be_billed=False, transient=False, detail=detail)
    if isinstance(error, exceptions.ContentPolicyViolationError) or code == "content_filter":
        return Failure(kind="content_filter", may_be_billed=False, transient=False, detail=detail)
    if status is not None:
        return _failure_of_status(status, headers, code, detail)
    unsent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout, httpx.PoolTimeout)
    # aiohttp's broken pipes also arrive as httpx.ConnectError.
    plain = _has(chain, httpx.ConnectError) and not _has(chain, aiohttp.ClientError)
    if _has(chain, unsent) or plain:
        return Failure(kind="connection", may_be_billed=False, transient=True, reached=False, detail=detail)
    if _has(chain, (TimeoutError, openai.APITimeoutError)):
        return Failure(kind="timeout", may_be_billed=True, transient=True, detail=detail)
    if _has(chain, (httpx.TransportError, aiohttp.ClientError)):
        return Failure(kind="connection", may_be_billed=True, transient=True, detail=detail)
    unreadable = _has(chain, ValueError)  # of json, text encoding or pydantic
    if not unreadable and isinstance(error, openai.APIStatusError) and 400 <= error.status_code < 500:
        # An error in a reply of status 200, or a request that litellm itself rejected.
        return _failure_of_status(error.status_code, headers, code, detail)
    return Failure(kind="api_error", may_be_billed=True, transient=True, detail=detail)


def _failure_of_status(status: int, headers: Mapping[str, str], code: str | None, detail: str) -> Failure:
    transient = status >= 500 or status in TRANSIENT_STATUSES
    return Failure(
        kind=KINDS.get(status, "api_error" if transient else "bad_request"),
        may_be_billed=status in TIMEOUT_STATUSES,
        transient=transient,
        refused="credit" if code in NO_CREDIT else REFUSALS.get(status),
        retry_after=retry_after(headers),
        detail=f"status {status}: {detail}" if detail else f"status {status}",
    )


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a reply's headers ask to wait, or None.

    Args:
        headers: ``retry-after-ms``, or ``retry-after`` as seconds or as a date (RFC 9110, 10.2.3).
        now: Unix time, for tests.
    """
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers["retry-after"])
    except KeyError:
        return None
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(headers["retry-after"])
            seconds = date.timestamp() - (time.time() if now is None else now)
        except (KeyError, ValueError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if seconds == seconds else None  # not NaN


def redact(text: str) -> str:
    """Return ``text`` as one short printable line without keys.

    The values of environment variables named like secrets are removed, and any text that looks like a key.
    """
    secrets = (value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name))
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a prefix of another
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    text = KEY_TEXT.sub("***", text)
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split())
    return text if len(text) <= MAX_DETAIL_CHARS else text[: MAX_DETAIL_CHARS - 3] + "..."


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error and the errors that it was raised from, outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _has(chain: list[BaseException], types: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    return any(isinstance(error, types) for error in chain)


def _reply(chain: list[BaseException]) -> tuple[int | None, Mapping[str, str], str | None]:
    """Return status, headers and error code of the reply with which the server refused; None without one."""
    import httpx
    import openai

    status: int | None = None
    headers: Mapping[str, str] = {}
    code: str | None = None
    for error in chain:
        if isinstance(error, httpx.HTTPStatusError):
            status, headers = error.response.status_code, error.response.headers
        # litellm's own classes derive from openai's but set a status of their own.
        elif isinstance(error, openai.APIStatusError) and type(error).__module__.startswith("openai"):
            status, headers = error.status_code, error.response.headers
            code = error.code if isinstance(error.code, str) else code
    return status, headers, code


def _detail(chain: list[BaseException]) -> str:
    """Return the provider's message."""
    for error in chain:
        body = getattr(error, "body", None)
        if isinstance(body, dict) and isinstance(body.get("message"), str):
            return redact(body["message"])
    # The outermost of litellm's errors adds remarks to the text of the one below.
    quoted = chain[1] if len(chain) > 1 else chain[0]
    message = getattr(quoted, "message", None)
    text = message if isinstance(message, str) else str(quoted)
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return redact(text)
