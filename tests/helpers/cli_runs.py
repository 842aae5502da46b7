"""The command line, run in this process or in two forked ones, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from stablesr_kit.cli import app, main
from tests.helpers.forks import FORKS, free_port, of_two_processes, write_streams_to


def stablesr(*arguments: object) -> Result:
    """What a command prints and its exit status; an error that it did not catch is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def stablesr_in_two_processes(*arguments: object, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The same by two processes as `accelerate launch` starts them, without a start of whole programs.

    folder: for the files that their output goes to.
    """
    port, out, err = free_port(), folder / "stdout", folder / "stderr"
    parts = [str(argument) for argument in arguments]
    processes = [FORKS.Process(target=_main, args=(parts, rank, port, out, err)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    status = max(255 if process.exitcode is None else abs(process.exitcode) for process in processes)
    return subprocess.CompletedProcess(parts, status, out.read_text(), err.read_text())


def _main(arguments: list[str], rank: int, port: int, out: Path, err: Path) -> None:
    os.environ |= of_two_processes(rank, port)
    write_streams_to(out, err)
    sys.argv[1:] = arguments
    main()


def error_lines(result: Result) -> list[str]:
    """The lines on stderr, each of which is one that a user can read."""
    lines = result.stderr.splitlines()
    assert all(line.startswith(("error: ", "note: ", "plan: ", "interrupted: ")) for line in lines), lines
    return lines


def pixels_of(file: Path) -> np.ndarray:
    """RGB pixels (H, W, 3), or (H, W) of a grey file."""
    with Image.open(file) as image:
        return np.asarray(image)
