"""Which files of a folder are pictures: by their endings, and by their first bytes where an ending says nothing."""

import os
from pathlib import Path
from typing import NamedTuple

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.formats import START, SUFFIXES, format_of


class Found(NamedTuple):
    """What is in a folder and below it, each sorted."""

    pictures: list[Path]
    passed_over: list[Path]
    """Files that are no pictures, hidden ones, and folders that are not looked into."""


def find_pictures(folder: Path, besides: Path | None = None) -> Found:
    """The pictures in a folder and all folders below it; links are followed, each folder once.

    A file is one by its ending, in capitals or not, whatever it holds, so that a damaged one is not lost; or, with
    another ending or none, by its first bytes. Hidden files and folders are passed over. besides: a folder that is not
    looked into, such as that of the results.

    Raises:
        ImageError: there is no such folder, or it or one below cannot be listed.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; check the name")

    def stop(error: OSError) -> None:
        raise ImageError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error

    found = Found([], [])
    seen = {folder.resolve()}
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        for name in list(folders):
            path = Path(parent, name)
            place = path.resolve()
            if name.startswith(".") or place in seen or (besides is not None and place == besides.resolve()):
                folders.remove(name)
                if name != ".stablesr":
                    found.passed_over.append(path)
            seen.add(place)
        for name in names:
            path = Path(parent, name)
            (found.pictures if _is_picture(path) else found.passed_over).append(path)
    found.pictures.sort()
    found.passed_over.sort()
    return found


def _is_picture(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return format_of(file.read(START)) is not None
    except OSError:
        return False
