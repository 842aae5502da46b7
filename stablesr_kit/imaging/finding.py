"""Which files are pictures, and of which format: by their first bytes and by the endings of their names."""

import os
from pathlib import Path
from typing import NamedTuple

from stablesr_kit.errors import ImageError

READ_FORMATS = ("AVIF", "BMP", "GIF", "HEIC", "JPEG", "JPEG 2000", "JPEG XL", "PNG", "PNM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .heic .heif .hif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .jxl .mpo .pbm .pfm .pgm "
    ".png .pnm .ppm .tif .tiff .webp".split()
)
START = 64
"""Number of first bytes that show a file's format."""

_STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
_AVIF_BRANDS, _HEIC_BRANDS = (
    (b"avif", b"avis"),
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
)


def format_of(start: bytes) -> str | None:
    """The format, of `READ_FORMATS`, of a file with these first bytes (`START` of them); None for anything else."""
    for magic, name in _STARTS.items():
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        brands = [start[i : i + 4] for i in (8, *range(16, min(int.from_bytes(start[:4], "big"), START), 4))]
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "AVIF"
        return "HEIC" if any(brand in _HEIC_BRANDS for brand in brands) else None
    if start[:2] == b"BM" and start[6:10] == bytes(4):
        return "BMP"
    if start[:1] == b"P" and start[1:2] in b"123456f" and start[2:3].isspace():
        return "PNM"
    return None


class Found(NamedTuple):
    """The contents of a folder and its subfolders, each list sorted."""

    pictures: list[Path]
    passed_over: list[Path]
    """Files that are no pictures, hidden files, and folders that were skipped."""


def find_pictures(folder: Path, besides: Path | None = None) -> Found:
    """The pictures in a folder and its subfolders; links are followed, each folder is visited once.

    A file is a picture by its ending, in any case, even if it is damaged, so that none gets lost; or, with another
    ending, by its first bytes. Hidden files and folders are skipped. besides: another folder to skip, such as that of
    the results.

    Raises:
        ImageError: there is no such folder, or it or a subfolder cannot be listed.
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
