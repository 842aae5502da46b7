"""Processes that are forked, in milliseconds, where the imports are done.

One server forks for all tests of a process: what it has imported is said here, once, before it starts.
"""

import multiprocessing
import os
import socket
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "stablesr_kit.cli.restore",
        "stablesr_kit.pipelines.stablesr",
        "stablesr_kit.training.run.run",
        "deepspeed",  # accelerate imports it if it is there
    ]
)


def of_two_processes(rank: int, port: int) -> dict[str, str]:
    """Environment variables that tell one of two processes on this machine of the other."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def write_streams_to(out: Path, err: Path) -> None:
    """Whatever this process writes to stdout and stderr is added to these files."""
    for number, file in enumerate((out, err), start=1):
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), number)
