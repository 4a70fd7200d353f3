"""An OpenAI-compatible server on loopback that grades by a rule and fails as told; for tests.

::

    with FaultServer(faults={"error_500": 0.2, "stall": 0.1}, seed=1) as server:
        ...  # a client of server.base_url

Which fault a request meets depends on ``seed``, its model, the text of its messages and how often the two were seen
before, on nothing else: runs repeat, whatever the order and the concurrency of their requests. Random boundaries
(long hexadecimal words) do not count as text.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Messages = list[dict[str, str]]
Grader = Callable[[Messages], str]

BOUNDARY = re.compile(r"\b[0-9a-f]{16,}\b")
HUGE_CHARS = 2_000_000


@dataclass(frozen=True)
class Request:
    """One request as the server saw it: its json body, which try of its text it is (from 0), its fault and key."""

    body: dict[str, Any]
    attempt: int
    fault: str | None
    authorization: str | None


class FaultServer:
    """See the module's text.

    Args:
        faults: the probability of each kind (a name in ``FAULTS``); the rest is answered properly.
        seed: of the choice of faults.
        grade: the reply's text to given messages; by default ``grade_steps``.
        stall_seconds: how long a stalled request waits before its connection is cut.
        retry_after: seconds of the Retry-After header of a 429; None leaves it out.
        key: refuse every other bearer token with 401; None accepts all.
        keep: how many requests ``requests`` holds, the newest.

    Attributes:
        requests: the newest requests.
        counts: requests by fault, those without one under None.
    """

    def __init__(
        self,
        *,
        faults: Mapping[str, float] | None = None,
        seed: int = 0,
        grade: Grader | None = None,
        stall_seconds: float = 30.0,
        retry_after: float | None = 0.0,
        key: str | None = None,
        keep: int = 1000,
    ) -> None:
        self.faults = dict(faults or {})
        unknown = set(self.faults) - set(FAULTS)
        assert not unknown, f"no such faults: {sorted(unknown)}"
        assert sum(self.faults.values()) <= 1.0 + 1e-9, self.faults
        self.seed = seed
        self.grade = grade or grade_steps
        self.stall_seconds = stall_seconds
        self.retry_after = retry_after
        self.key = key
        self.requests: deque[Request] = deque(maxlen=keep)
        self.counts: Counter[str | None] = Counter()
        self._tries: Counter[bytes] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-server", daemon=True)
        self._runner: web.AppRunner | None = None
        self.base_url = ""

    def __enter__(self) -> FaultServer:
        self._thread.start()
        self.base_url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def forget(self) -> None:
        """Count the tries of every text from 0 again, as for a first run."""
        self._tries.clear()

    def fault_of(self, body: Mapping[str, Any], attempt: int) -> str | None:
        """What try ``attempt`` (from 0) of a request meets: a kind of fault, or None. Tests may replace it."""
        digest = hashlib.blake2b(f"{self.seed}\0{attempt}\0".encode() + fingerprint(body), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        for kind, share in self.faults.items():
            if place < share:
                return kind
            place -= share
        return None

    async def _start(self) -> str:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._answer)
        # Cancelled handlers: a stall ends when its client hangs up, and so does the test.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{port}/v1"

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        name = fingerprint(body)
        attempt = self._tries[name]
        self._tries[name] += 1
        fault = self.fault_of(body, attempt)
        authorization = http.headers.get("authorization")
        self.requests.append(Request(body, attempt, fault, authorization))
        self.counts[fault] += 1
        if self.key is not None and authorization != f"Bearer {self.key}":
            return failure(401, f"Incorrect API key provided: {authorization}", code="invalid_api_key")
        return await (FAULTS[fault] if fault else answer)(self, http, body)

    def reply_to(self, body: dict[str, Any]) -> str:
        return self.grade(body["messages"])


def fingerprint(body: Mapping[str, Any]) -> bytes:
    """Of a request's model and messages, random boundaries left out."""
    lines = [body["model"], *(f"{message['role']}: {message['content']}" for message in body["messages"])]
    text = BOUNDARY.sub("", "\n".join(lines))
    return hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=16).digest()


def completion(body: dict[str, Any], text: str | None, *, reason: str = "stop") -> dict[str, Any]:
    """The json of a chat completion; a token counts four characters."""
    prompt_tokens = sum(len(message["content"]) for message in body["messages"]) // 4 + 4
    completion_tokens = len(text or "") // 4 + 1
    return {
        "id": "chatcmpl-loopback",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def failure(status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None) -> Any:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


# -- grading ---------------------------------------------------------------------------------------------------------


def score_of(text: str, kind: str) -> int:
    """The score that ``grade_steps`` gives a step: any in its range, and a function of its stripped text alone."""
    place = zlib.crc32(text.strip().encode("utf-8", errors="replace"))
    return place % 101 if kind == "final" else place % 201 - 100


def steps_of(messages: Messages) -> dict[int, tuple[str, str]]:
    """Index, kind and stripped text of every step in a prompt: what stands under headings with its boundary.

    A repair asks again below the same prompt, so the first user message that has headings counts.
    """
    for message in messages:
        found = BOUNDARY.search(message["content"]) if message["role"] == "user" else None
        if found is None:
            continue
        boundary = found.group()
        # From a heading to the next line that carries the code.
        sections = re.findall(
            rf"^\[{boundary} ([^\n]*)\]\n(.*?)(?=^[^\n]*{boundary}|\Z)", message["content"], re.M | re.S
        )
        steps = {}
        for heading, text in sections:
            kind, _, number = heading.partition(" ")
            if kind in ("step", "final"):
                steps[int(number)] = (kind, text.strip())
        return steps
    return {}


def verdicts(scores: Mapping[int, Any]) -> str:
    """The judge's json for scores by index; NaN as Python writes it."""
    return json.dumps({"scores": [{"index": i, "score": s, "rationale": "as told"} for i, s in scores.items()]})


def grade_steps(messages: Messages) -> str:
    """Every step's ``score_of`` as the json that the rubric asks for."""
    return verdicts({index: score_of(text, kind) for index, (kind, text) in steps_of(messages).items()})


# -- what can happen to a request ------------------------------------------------------------------------------------


async def answer(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(completion(body, server.reply_to(body)))


async def error_500(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As careless servers do, it quotes the key."""
    return failure(500, f"the model crashed on a request with {http.headers.get('authorization')}")


async def rate_limit(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    headers = {} if server.retry_after is None else {"retry-after": f"{server.retry_after:g}"}
    return failure(429, "slow down", code="rate_limit_exceeded", headers=headers)


async def stall(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(server.stall_seconds)
    return await closed_socket(server, http, body)


async def trickle(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The reply comes a byte at a time, so that no single read ever takes long."""
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(http)
    for _ in range(int(server.stall_seconds / 0.02)):
        await response.write(b" ")
        await asyncio.sleep(0.02)
    return response


async def closed_socket(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The connection ends without a reply."""
    if http.transport is not None:
        http.transport.abort()
    return web.Response()


async def cut_body(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The connection ends in the middle of the promised body."""
    data = json.dumps(completion(body, server.reply_to(body))).encode()
    response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(data))})
    await response.prepare(http)
    await response.write(data[: len(data) // 2])
    if http.transport is not None:
        http.transport.close()
    return response


async def truncated_json(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A whole reply by HTTP's count whose body is half a json object."""
    data = json.dumps(completion(body, server.reply_to(body)))
    return web.Response(text=data[: len(data) // 2], content_type="application/json")


async def wrong_type(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A web page with status 200, such as that of a proxy."""
    return web.Response(text="<html><body>Please log in.</body></html>", content_type="text/html")


async def no_choices(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({**completion(body, ""), "choices": []})


async def context_window(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    text = "This model's maximum context length is 8 tokens. However, your messages resulted in more."
    return failure(400, text, code="context_length_exceeded")


async def content_filter(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(completion(body, None, reason="content_filter"))


def _reply(change: Callable[[str], str | None]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """A well-formed completion whose text is ``change`` of the right one."""

    async def handler(server: FaultServer, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(completion(body, change(server.reply_to(body))))

    return handler


def _rescore(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[str], str]:
    """``change`` applied to the list of verdicts in a reply."""

    def changed(reply: str) -> str:
        return json.dumps({"scores": change(json.loads(reply)["scores"])})

    return changed


FAULTS: dict[str, Callable[..., Awaitable[web.StreamResponse]]] = {
    # the request fails
    "error_500": error_500,
    "rate_limit": rate_limit,
    "stall": stall,
    "trickle": trickle,
    "closed_socket": closed_socket,
    "cut_body": cut_body,
    "truncated_json": truncated_json,
    "wrong_type": wrong_type,
    "no_choices": no_choices,
    "context_window": context_window,
    "content_filter": content_filter,
    # the reply is no verdict
    "empty_reply": _reply(lambda text: ""),
    "null_reply": _reply(lambda text: None),
    "prose": _reply(lambda text: "The student does well. I would give most of these steps a high score."),
    "half_reply": _reply(lambda text: text[: len(text) // 2]),
    "huge_reply": _reply(lambda text: "Well. " * (HUGE_CHARS // 6)),
    # the verdicts are wrong
    "too_few": _reply(_rescore(lambda scores: scores[:-1])),
    "too_many": _reply(_rescore(lambda scores: [*scores, *({**s, "index": s["index"] + 1} for s in scores[-1:])])),
    "from_zero": _reply(_rescore(lambda scores: [{**s, "index": s["index"] - 1} for s in scores])),
    "out_of_range": _reply(_rescore(lambda scores: [{**s, "score": s["score"] + 1000} for s in scores])),
    "nan": _reply(_rescore(lambda scores: [{**s, "score": float("nan")} for s in scores])),
}
