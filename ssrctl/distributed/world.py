"""The processes of a job and what they send each other: objects, bytes and sums.

A process that ends breaks the connections of the others, so that their next exchange raises ``LostProcess``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssrctl.errors import LostProcess, Stopped, UserError, first_line
from ssrctl.io import console
from ssrctl.process_rank import is_launched, num_launched, rank

T = TypeVar("T")

# torch 2.13 has renamed it, and warns of the old name
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Longer than a step of the others: a critic's server may need long, and a process that ends is noticed at once.
LONGEST_WAIT = datetime.timedelta(hours=2)
STORE_SECONDS = 5.0


class World:
    """All processes of a job, seen from one of them.

    Args:
        rank: number of this process, from 0.
        size: number of processes; 1 exchanges nothing.
        device: where tensors that are exchanged live; a GPU has NCCL for these, and gloo for objects.
        ranks: of a team, whose processes gather objects and sum tensors; None is the whole job.

    Attributes:
        group: of the tensors; None with one process.
        bytes_sent, bytes_received: of tensors, since ``take_traffic``.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | str = "cpu",
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.bytes_sent = self.bytes_received = 0
        self.seconds = 0.0
        self._teams: dict[tuple[range, ...], World] = {}
        self.group: Any = None
        self._objects: Any = None
        if size > 1:  # objects and flags go through the CPU, also where tensors go from GPU to GPU
            self._objects = dist.new_group(None if ranks is None else list(ranks), LONGEST_WAIT, "gloo")
            if ranks is None:
                self.group = dist.group.WORLD
            else:
                self.group = self._objects if self.device.type == "cpu" else dist.new_group(list(ranks), LONGEST_WAIT)

    def team(self, teams: Sequence[range]) -> World:
        """Return the processes of this one's team; every process calls this with the same teams, which hold all ranks."""
        key = tuple(teams)
        if key not in self._teams:
            for team in teams:  # a group is made by all processes together, also by those outside it
                size = len(team)
                found = World(self.rank - team.start, size, self.device, team)
                if self.rank in team:
                    self._teams[key] = found
        return self._teams[key]

    @property
    def is_main(self) -> bool:
        """True in the process that logs, writes and shows progress."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """Return the objects of all processes by rank; every process calls this."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, mine, group=self._objects)
        return found

    def gather_on_main(self, mine: T) -> list[T]:
        """Return the objects of all processes by rank in the main process, an empty list in the others."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size if self.is_main else []
        with self._exchange():
            dist.gather_object(mine, found if self.is_main else None, dst=0, group=self._objects)
        return found

    def on_main(self, call: Callable[[], T]) -> T:
        """Call in the main process and return the result in all; an exception is raised in all."""
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = call()
                pickle.dumps(outcome[0])
            except Exception as error:
                outcome = [None, error]
        with self._exchange():
            dist.broadcast_object_list(outcome, src=0, group=self._objects)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def together(self, call: Callable[[], T]) -> T:
        """Return this process's result of ``call``; a UserError or Stopped in one process is raised in all."""
        if self.size == 1:
            return call()
        result: Any = None
        failed: UserError | Stopped | None = None
        try:
            result = call()
        except (UserError, Stopped) as error:
            failed = error
        for of_process in self.gather(failed):
            if of_process is not None:
                raise of_process
        mine: T = result
        return mine

    def any(self, flag: bool) -> bool:
        """Return True in all processes if ``flag`` is True in one."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        with self._exchange():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._objects)
        return bool(found)

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.size > 1:
            with self._exchange():
                dist.barrier(group=self._objects)

    def broadcast_bytes(self, mine: Tensor | None, num_bytes: int, source: int) -> Tensor:
        """Return the uint8 tensor ``[num_bytes]`` that the process ``source`` gives, on ``device``."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device) if mine is None else mine
        if self.size == 1 or not num_bytes:
            return buffer
        with self._exchange():
            dist.broadcast(buffer, src=source)
        if source == self.rank:
            self.bytes_sent += num_bytes * (self.size - 1)
        else:
            self.bytes_received += num_bytes
        return buffer

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all processes, the same bits in each; return it."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(tensor, group=self.group)
            self._count_ring(2 * tensor.numel() * tensor.element_size())
        return tensor

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """Return this process's part ``[n / size]``, by rank, of the sum of ``tensor`` ``[n]`` over all processes."""
        part = tensor.new_empty(tensor.numel() // self.size)
        with self._exchange():
            _reduce_scatter(part, tensor, group=self.group)
        self._count_ring(tensor.numel() * tensor.element_size())
        return part

    def _count_ring(self, num_bytes: int) -> None:
        """Count the traffic of an exchange around a ring, each part of the bytes ``size - 1`` times."""
        moved = num_bytes * (self.size - 1) // self.size
        self.bytes_sent, self.bytes_received = self.bytes_sent + moved, self.bytes_received + moved

    def take_traffic(self) -> dict[str, float]:
        """Return bytes and seconds of the exchanges since the last call, those of the team included."""
        made = {
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "exchange_seconds": self.seconds,
        }
        for team in self._teams.values():
            made = {key: value + made[key] for key, value in team.take_traffic().items()}
        self.bytes_sent = self.bytes_received = 0
        self.seconds = 0.0
        return made

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # every failure of a collective, with any backend
            raise LostProcess(
                f"process {rank()} of {num_launched()} lost the others: one of them has ended",
                "see the first error above; a process that was killed leaves none (out of memory?)",
            ) from error
        finally:
            self.seconds += time.perf_counter() - started


ALONE = World()


@contextlib.contextmanager
def joined_world(device: str = "auto") -> Iterator[World]:
    """Join the job that a launcher started; without one, yield a world of one process.

    Args:
        device: ``auto`` or a torch device; of several GPUs each process takes the one with its local number.

    Raises:
        UserError: the launcher's settings ask for an engine that ssrctl does not have.
    """
    if not is_launched():
        yield ALONE
        return
    check_launcher(os.environ)
    from accelerate.state import PartialState

    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not cpu and device not in ("auto", "cuda"):
        raise UserError(
            f"--device {device} with {num_launched()} processes: each would use the same device",
            "leave out --device, every process takes its own GPU",
        )
    try:
        state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise LostProcess(
            f"process {rank()} of {num_launched()} cannot reach the others: {first_line(error)}",
            "check that all were started and that MASTER_ADDR and MASTER_PORT can be reached",
        ) from error
    assert state.num_processes == num_launched(), "something asked accelerate for the device before"
    world = World(state.process_index, state.num_processes, state.device)
    yield world
    world.wait()
    with contextlib.suppress(RuntimeError):  # the others may have gone already
        state.destroy_process_group()


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise a UserError for launcher settings that would be ignored, and warn of those that change nothing.

    Args:
        environment: of the process; ``accelerate launch`` puts its settings there.
    """
    engines = {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    }
    for key, name in engines.items():
        if environment.get(key, "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {name}, which ssrctl does not run with",
                "launch plain processes (distributed_type MULTI_GPU); each holds the whole model",
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8":
        raise UserError("the launcher asks for fp8, which ssrctl does not have", "use --mixed_precision no")
    if precision != "no":
        console.warn(f"the launcher's mixed precision {precision} is not used: --dtype sets the precision")


def speaks_first() -> bool:
    """Return True in the first process of a job that calls this: only that one reports an error."""
    if not is_launched():
        return True
    job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=STORE_SECONDS),
        )
        return store.add(f"ssrctl/spoken/{job}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the store ended with the process that held it
        return True
