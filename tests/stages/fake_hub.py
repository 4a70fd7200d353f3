"""A stand-in for the Hugging Face hub: the routes that huggingface_hub uses for models, with contents in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER = "hf_writer0123456789"  # the token that may write


@dataclass
class Repo:
    """A repository of one branch."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files.items()))).encode()).hexdigest()

    @property
    def card(self) -> dict[str, Any]:
        text = self.files.get("README.md", b"").decode()
        return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}


@dataclass
class Hub:
    """The hub: its address and repositories by name."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    broken: str | None = None  # a route that answers with 500
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, code: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, code: int, text: str, kind: str = "") -> None:
        self._send(code, {"error": text}, X_Error_Message=text, **({"X_Error_Code": kind} if kind else {}))

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "")
        if self.hub.broken is not None and self.hub.broken in path:
            return self._error(500, f"no luck with {token}")
        if self.command == "POST" and token != f"Bearer {WRITER}":
            return self._error(403, f"{token} may not write here")  # as a careless proxy would say it
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repos:
                return self._send(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                )
            self.hub.repos[name] = Repo(asked.get("visibility") == "private")
            return self._send(200, {"url": f"{self.hub.url}/{name}"})
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token != f"Bearer {WRITER}"):
            return self._error(401, "Repository not found", "RepoNotFound")
        if rest[:1] == ["preupload"]:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del repo.files[line["value"]["path"]]
            repo.commits += 1
            return self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": one, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for one, data in repo.files.items()
            ]
            return self._send(200, tree)
        if rest[:1] == ["resolve"]:
            data = repo.files[rest[2]]
            etag = hashlib.sha1(data).hexdigest()
            return self._send(200, data, ETag=f'"{etag}"', X_Repo_Commit=repo.sha)
        if rest[:1] == ["revision"] and rest[1] not in ("main", repo.sha):
            return self._error(404, f"Invalid rev id: {rest[1]}", "RevisionNotFound")
        siblings = [{"rfilename": one} for one in repo.files]
        tags = repo.card.get("tags", [])
        return self._send(
            200, {"id": name, "sha": repo.sha, "siblings": siblings, "tags": tags, "cardData": repo.card or None}
        )

    do_GET = do_POST = do_HEAD = _answer


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub on the loopback address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
