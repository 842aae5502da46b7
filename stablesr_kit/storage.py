"""Files and folders that appear whole or not at all."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stablesr_kit.errors import OutputError, reason_of

_TORCH_WRITER = ("iostream", "inline_container", "PytorchStreamWriter", "Parent directory")
"""Words of torch.save about a file that cannot be written; it raises a plain RuntimeError."""

_ADVICE = "free space or choose another place"


@contextmanager
def replacing_file(path: Path, scratch: Path | None = None, is_synced: bool = True) -> Iterator[Path]:
    """A new file to write, which becomes `path` at the end: the old file or the new one is there, never a part.

    scratch: folder of the new file, on the same disk; None is beside `path`.
    is_synced: the file survives a crash of the machine; without it, only that of the process, which is faster.

    Raises OutputError if it cannot be written.
    """
    part = (scratch or path.parent) / f".{secrets.token_hex(8)}.part"  # short: names have a limit
    try:
        with writing(path):
            part.touch()
            mode = part.stat().st_mode
            yield part
            _finish(part, mode, is_synced)
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` at the end: the old one or the new one is there, never a part.

    Parents are made. Raises OutputError if it cannot be written.
    """
    part = part_of(folder)
    try:
        with writing(folder):
            _remove(part)  # of a process that was killed
            part.mkdir(parents=True)
            yield part
            publish(part, folder)
    finally:
        _remove(part)


def part_of(folder: Path) -> Path:
    """The name of a folder while it is written, the same for all processes that write into it; see `publish`."""
    return folder.with_name(f".{folder.name}.part")


def publish(part: Path, folder: Path) -> None:
    """Give a folder that is complete its final name, in place of what has that name. Raises OutputError.

    Its files get the permissions that the user's umask gives to new files, also where a library chose others.
    """
    with writing(folder):
        mode = part.stat().st_mode
        for path in part.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _finish(path, mode)
        old = folder.with_name(f".{folder.name}.old")
        _remove(old)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        _remove(old)


@contextmanager
def writing(path: Path, advice: str = _ADVICE) -> Iterator[None]:
    """While `path` is written by whatever library, raise OutputError for each error that says it cannot be."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error, advice) from error
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_WRITER):
            raise
        raise unwritable(path, error, advice) from error


def unwritable(path: Path, error: BaseException, advice: str = _ADVICE) -> OutputError:
    """The error that says that `path` cannot be written, why, and what to do."""
    told = f"{path}: cannot be written ({reason_of(error)})"
    if not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with suppress(OSError, StopIteration):
            there = next(place for place in path.absolute().parents if place.is_dir())
            told += f", {shutil.disk_usage(there).free / 2**20:.0f} MB are free there"
    return OutputError(f"{told}; {advice}")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        content = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
        return hashlib.sha256(content.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(file: Path, mode: int, is_synced: bool = True) -> None:
    """Give a file the permissions of `mode` without those to execute, and wait until the disk has it."""
    file.chmod(mode & 0o666)
    if is_synced:
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
