"""`ssrctl serve-rollouts` with a program in the place of Python that plays vLLM."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from ssrctl.configs import ServeRolloutsConfig
from ssrctl.errors import UserError
from ssrctl.stages import serve_rollouts

# `-c` is the check of the environment; else a server that answers anything and notes its end.
PLAYER = """#!{python}
import os, signal, sys
if sys.argv[1] == "-c":
    print("{found}")
    sys.exit()
if "--fails" in sys.argv:
    sys.exit(7)
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *a): ...
def end(*a):
    open("ended", "w").write(os.environ["VLLM_SERVER_DEV_MODE"] + " " + " ".join(sys.argv[1:]))
    os._exit(0)
signal.signal(signal.SIGTERM, end)
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.serve_forever()
"""


def player(folder: Path, found: str = "True True") -> str:
    path = folder / "python"
    path.write_text(PLAYER.format(python=sys.executable, found=found))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def free_url() -> str:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_the_server_ends_with_the_command_whose_exit_code_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ServeRolloutsConfig(python=player(tmp_path), url=free_url(), command=["sh", "-c", "test ! -e ended"])
    assert serve_rollouts.run(config) is None
    mode, *words = Path("ended").read_text().split()
    assert mode == "1" and words[1] == "vllm.entrypoints.openai.api_server"
    assert Path(words[words.index("--model") + 1]).is_dir() and words[words.index("--dtype") + 1] == "float32"
    with pytest.raises(SystemExit) as code:
        serve_rollouts.run(ServeRolloutsConfig(python=player(tmp_path), url=free_url(), command=["sh", "-c", "exit 3"]))
    assert code.value.code == 3


def test_environments_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    def refusal(**settings: object) -> str:
        with pytest.raises(UserError) as error:
            serve_rollouts.run(ServeRolloutsConfig(command=["true"], url=free_url(), **settings))  # type: ignore[arg-type]
        return str(error.value)

    assert "is not a program" in refusal(python=str(tmp_path / "none"))
    assert "has no vLLM" in refusal(python=player(tmp_path, "False False"))
    assert "-m pip install --no-deps ssrctl" in refusal(python=player(tmp_path, "True False"))
    assert "exit code 7" in refusal(python=player(tmp_path), vllm_arg=["--fails"])
    assert "cannot be written" in refusal(python=player(tmp_path), log=tmp_path)


def test_a_dry_run_prints_the_command_and_starts_nothing() -> None:
    plan = serve_rollouts.run(ServeRolloutsConfig(dry_run=True, vllm_arg=["--max-model-len=64"], dtype="bfloat16"))
    assert plan is not None
    line = plan["command"]
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 ") and line.endswith("--max-model-len=64")
    assert "--logprobs-mode processed_logprobs" in line and '\'{"backend": "ssrctl"}\'' in line
