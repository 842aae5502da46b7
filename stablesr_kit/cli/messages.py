"""Messages of the command line: results on stdout; notes and errors on stderr, one line each."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, NoReturn

import typer
from tqdm import tqdm

from stablesr_kit.errors import CheckpointError, ModelNotFoundError, StableSRKitError

_worked_on: ContextVar[Path | None] = ContextVar("worked_on", default=None)


def one_line(message: object) -> str:
    """The message on one line, without control characters (file names and library errors may hold some)."""
    text = " ".join(str(message).split())
    return "".join(character if character.isprintable() else "?" for character in text)


class UsageError(typer.BadParameter):
    """Ends a command with one line on stderr and exit status 2."""

    def format_message(self) -> str:
        """The line."""
        return one_line(self.message)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it, without the usage of the command, which Typer would show as well."""
        typer.echo(f"error: {self.format_message()}", file, err=True)


def usage_error(message: str) -> NoReturn:
    """End the command with one line on stderr and exit status 2: nothing was done, the call must change."""
    raise UsageError(message)


@contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Print errors that a user can cause as one line on stderr; exit status 2 for a wrong model name, else 1."""
    try:
        yield
    except ModelNotFoundError as error:
        usage_error(str(error))
    except StableSRKitError as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turn every error of diffusers about a damaged model into a CheckpointError of one line."""
    try:
        yield
    except StableSRKitError:
        raise
    # Files are missing, cut short or foreign, options of other types, tensors left out.
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{model}: the model cannot be loaded ({error}); get a whole copy of it") from error


class Notes(logging.Handler):
    """Prints warnings of the toolkit as notes, beginning with the file in `noting`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line above the progress bars."""
        source = _worked_on.get()
        parts = [] if source is None else [one_line(source)]
        tqdm.write(": ".join(["note", *parts, one_line(record.getMessage())]), file=sys.stderr)


@contextmanager
def noting(source: Path) -> Iterator[None]:
    """Let warnings name this file."""
    token = _worked_on.set(source)
    try:
        yield
    finally:
        _worked_on.reset(token)


@contextmanager
def telling(logger_name: str) -> Iterator[None]:
    """Let a part of the toolkit log what it does, not only warnings."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


def quieten_imports() -> None:
    """Silence libraries that are not imported yet: while it is imported, transformers warns of missing packages.

    Environment variables that are set already win. DeepSpeed, if installed, is imported whenever transformers saves a
    network, and logs to stdout.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def quieten_libraries() -> None:
    """Silence transformers and diffusers: no advice, no log of raised errors, no bars without terminal."""
    quieten_imports()

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
