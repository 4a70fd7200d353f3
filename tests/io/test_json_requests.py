"""Requests in json against a server that breaks off, refuses, redirects and sends no json."""

import socketserver
import threading

import pytest

from ssrctl.errors import UserError
from ssrctl.io.json_requests import NoAnswer, Refused, ask

REPLIES = {
    "/right": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n[1, 2]\n",
    "/empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "/headless": b"",
    "/no-body": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n",
    "/half": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n[1]",
    "/text": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "/busy": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 90\r\n\r\ntoo many\n requests",
    "/moved": b"HTTP/1.1 307 Moved\r\nLocation: /right\r\nContent-Length: 0\r\n\r\n",
}


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode()
        for line in iter(self.rfile.readline, b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                body = int(line.split(b":")[1])
        self.rfile.read(body)
        self.wfile.write(REPLIES[path])


@pytest.mark.parametrize("direct", [False, True])
def test_every_reply_is_an_answer_or_one_of_two_errors(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = {}
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        for path in REPLIES:
            try:
                address = f"http://127.0.0.1:{server.server_address[1]}{path}"
                found[path] = ask(address, {"a": 1}, seconds=5, direct=direct)
            except NoAnswer as error:
                found[path] = error.kind, str(error)
            except Refused as error:
                found[path] = error.status, str(error)
        server.shutdown()
    assert found.pop("/headless")[0] == "connection"
    assert found == {
        "/right": [1, 2],
        "/empty": {},
        "/no-body": ("connection", "the reply breaks off after 0 bytes"),
        "/half": ("connection", "the reply breaks off after 3 bytes"),
        "/text": ("not json", "its reply is not json"),
        "/busy": (503, "HTTP 503: too many requests"),
        "/moved": (307, "HTTP 307: Moved"),
    }


def test_a_text_that_is_no_key_is_not_sent_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "abc123\n")
    with pytest.raises(UserError, match="VLLM_API_KEY cannot be a key") as raised:
        ask("http://127.0.0.1:1/", seconds=1)
    assert "abc123" not in str(raised.value)
