"""Files that cannot grow, and files that are open."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to make any file of this process longer: a real error of the kind of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def open_files(folder: Path) -> list[str]:
    """Files of this process in `folder`, also those without a name."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only Linux lists a process's open files")
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder))]
