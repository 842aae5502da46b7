"""The command line, run in this process, and what it leaves behind."""

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from stablesr_kit.cli import app


def stablesr(*arguments: object) -> Result:
    """What a command prints and its exit status; an error that it did not catch is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_lines(result: Result) -> list[str]:
    """The lines on stderr, each of which is one that a user can read."""
    lines = result.stderr.splitlines()
    assert all(line.startswith(("error: ", "note: ", "plan: ", "interrupted: ")) for line in lines), lines
    return lines


def pixels_of(file: Path) -> np.ndarray:
    """RGB pixels (H, W, 3), or (H, W) of a grey file."""
    with Image.open(file) as image:
        return np.asarray(image)
