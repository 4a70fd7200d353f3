"""Commands in several forked processes, joined through gloo: what a launcher does, without the imports."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (negative for a signal), and what it printed on stderr and stdout."""

    code: int
    err: str
    out: str


def _run(rank: int, size: int, port: int, words: Sequence[str], folder: Path, before: Callable[[int], None] | None):
    from accelerate.state import PartialState

    from ssrctl.cli import main
    from ssrctl.io import console

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    PartialState._reset_state()  # the parent may have one, of one process
    console.console.cache_clear()
    if before is not None:
        before(rank)
    code = main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_processes(
    words: Sequence[str] | Callable[[int], Sequence[str]],
    size: int,
    folder: Path,
    before: Callable[[int], None] | None = None,
) -> list[Ended]:
    """Run ``ssrctl`` with ``words`` (or those of each rank) in ``size`` processes; ``before`` is called first in each."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has it
    started = []
    for rank in range(size):
        mine = words(rank) if callable(words) else words
        started.append(context.Process(target=_run, args=(rank, size, store.port, mine, folder, before)))
        started[-1].start()
    for process in started:
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [
        Ended(process.exitcode, (folder / f"err{rank}").read_text(), (folder / f"out{rank}").read_text())
        for rank, process in enumerate(started)
    ]
