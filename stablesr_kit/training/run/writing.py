"""What happens when a file of a run cannot be written: one line that says so, whatever library was writing it."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import FileHandler, LogRecord
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from stablesr_kit.errors import OutputError
from stablesr_kit.training.run.state import UNFINISHED

TORCH_WRITER = ("iostream", "inline_container", "PytorchStreamWriter")
"""Words that torch.save says of a file that cannot be written, always in a RuntimeError."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While `path` is written, raise OutputError in place of every error that says it cannot be."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        _refuse(path, error)
    except RuntimeError as error:
        if not any(word in str(error) for word in TORCH_WRITER):
            raise
        _refuse(path, error)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at the end.

    Raises OutputError where it cannot be written; then the old one is still there and nothing of the new one.
    """
    beside = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(folder):
            beside.mkdir(parents=True)
            yield beside
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    except OutputError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


class LogFile(FileHandler):
    """A log that ends the run with OutputError when it cannot be written."""

    def handleError(self, _record: LogRecord) -> None:
        """Raise OutputError in place of the error that is being handled."""
        error = sys.exc_info()[1]
        assert error is not None  # logging calls this while it handles one
        _refuse(Path(self.baseFilename), error)


def _refuse(path: Path, error: BaseException) -> NoReturn:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free / 2**20
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise OutputError(
        f"{path}: cannot be written ({reason.splitlines()[0]}), {free:.0f} MB are free there; make room "
        "or choose another place; the same command then goes on from the last whole checkpoint"
    ) from error
