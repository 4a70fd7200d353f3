"""Starting a command in several processes, through accelerate's launcher, as ``accelerate launch`` would."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ssrctl.errors import Failed, UserError
from ssrctl.process_rank import MARK

# Seconds that the others have to end when one process has ended, or on Ctrl-C; then they are killed.
SHUTDOWN_SECONDS = "50"
ENGINES = ("NO", "MULTI_CPU", "MULTI_GPU")
_PORT = ("--main_process_port", "0")


def launch(words: Sequence[str], num_processes: int | None, accelerate_config: Path | None) -> int:
    """Run ``ssrctl`` with ``words`` in several processes and wait for them.

    Args:
        words: the command line after ``ssrctl``; the processes ignore ``--num-processes`` and ``--accelerate-config``.
        num_processes: on this machine; None takes the number from the file.
        accelerate_config: a file that ``accelerate config`` wrote.

    Returns:
        The exit code of the process that failed first; 0 when none did.

    Raises:
        UserError: the launcher refuses its settings.
        Failed: a process was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = [*_PORT, "--multi_gpu"]  # on a machine without GPUs too: this starts the processes as torchrun does
    if num_processes is not None:
        given += ["--num_processes", str(num_processes), "--num_machines", "1"]
    if accelerate_config is None:
        given += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        check_config(accelerate_config)
        given += ["--config_file", str(accelerate_config)]
    os.environ[MARK] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    for name in ("torch.distributed.elastic", "torch.distributed.run", "accelerate"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their reports of a failed process fill a screen
    try:
        launch_command(launch_command_parser().parse_args([*given, "--module", "ssrctl", *words]))
    except ChildFailedError as failure:
        # found at one look: a process that was killed, and others that lost it
        # and those that the launcher ended
        rank, first = min(
            failure.failures.items(), key=lambda item: (_consequence(item[1].exitcode), item[1].timestamp)
        )
        if first.exitcode > 0:
            return first.exitcode
        raise Failed(
            f"process {rank} was killed ({signal.Signals(-first.exitcode).name}); the others were ended",
            "its last checkpoint is whole: continue with --resume-from-checkpoint latest",
        ) from None
    except subprocess.CalledProcessError as failure:  # one process
        return failure.returncode if failure.returncode > 0 else 1
    except SignalException:  # passed on to the processes, which have said what they kept
        return 3
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # what accelerate has against its settings
        raise UserError(
            f"accelerate cannot launch: {error}", "check --num-processes and --accelerate-config"
        ) from error
    return 0


def _consequence(code: int) -> int:
    """Return 0 for the exit code of a process that was killed, more for one that follows from another's end."""
    if code < 0:
        return 3 if code == -signal.SIGTERM else 0
    return 2 if code == 1 else 1


def check_config(path: Path) -> None:
    """Raise a UserError for a file of ``accelerate config`` that asks for an engine or a precision that we do not have."""
    import yaml

    if not path.is_file():
        raise UserError(
            f"--accelerate-config not found: {path}", "write one with `accelerate config --config_file FILE`"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}", "write it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings", "write one with `accelerate config --config_file FILE`")
    engine = str(found.get("distributed_type", "NO")).upper()
    if engine not in ENGINES:
        raise UserError(
            f"{path} asks for {engine}, which ssrctl does not run with",
            "use distributed_type: MULTI_GPU, with the whole model in every process",
        )
    if str(found.get("mixed_precision", "no")).lower() == "fp8":
        raise UserError(f"{path} asks for fp8, which ssrctl does not have", "use mixed_precision: no and --dtype")
