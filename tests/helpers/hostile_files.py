"""Files that mean harm or are broken: valid ones of every format, mutated. The same seed gives the same files."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile
from PIL import Image

from tests.helpers.picture_files import noise, png_chunk

NAMES = (
    "..evil.png",
    "..\\..\\evil.png",
    "a\nb.jpg",
    "$(touch evil).tif",
    "%2e%2e%2fevil.png",
    "-o evil.webp",
    "\u00e9\u202e.gif",
    " .png",
)
"""Names that try to leave the folder, to be options, or to break a line."""


def valid_files(seed: int) -> list[tuple[str, bytes]]:
    """A small picture in each kind of file, as (ending, content)."""
    rgb, deep = noise(64, 56, seed=seed), noise(64, 56, dtype=np.uint16, seed=seed)
    image = Image.fromarray(rgb)
    files: list[tuple[str, bytes]] = []
    saved: list[tuple[str, str, Image.Image, dict[str, Any]]] = [
        ("png", "PNG", image, {}),
        ("png", "PNG", image.convert("P"), {"transparency": 3}),
        ("jpg", "JPEG", image, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", "comment": b"c"}),
        ("jpg", "JPEG", image, {"progressive": True}),
        ("jpg", "JPEG", image.convert("CMYK"), {}),
        ("mpo", "MPO", image, {"save_all": True, "append_images": [image]}),
        ("tif", "TIFF", image, {"compression": "tiff_lzw"}),
        ("webp", "WEBP", image, {}),
        ("webp", "WEBP", image.convert("RGBA"), {"lossless": True}),
        ("gif", "GIF", image.convert("P"), {}),
        ("avif", "AVIF", image, {}),
        ("bmp", "BMP", image, {}),
        ("ppm", "PPM", image, {}),
        ("jp2", "JPEG2000", image, {}),
    ]
    for ending, kind, picture, options in saved:
        buffer = BytesIO()
        picture.save(buffer, kind, **options)
        files.append((ending, buffer.getvalue()))
    layouts: tuple[dict[str, Any], ...] = ({"tile": (16, 16)}, {"planarconfig": "separate"}, {"bigtiff": True})
    for options in layouts:
        buffer = BytesIO()
        stored = deep.transpose(2, 0, 1).copy() if "planarconfig" in options else deep
        tifffile.imwrite(buffer, stored, photometric="rgb", **options)
        files.append(("tif", buffer.getvalue()))
    files.append(("png", pyvips.Image.new_from_array(deep).copy(interpretation="rgb16").pngsave_buffer()))
    return files


def hostile_files(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """So many files in the folder, none of which may do more harm than a line."""
    random = np.random.default_rng(seed)
    valid = valid_files(seed)
    paths = []
    for number in range(count):
        mutate = _MUTATIONS[number % len(_MUTATIONS)]
        ending, content = valid[(number // len(_MUTATIONS) + number) % len(valid)]
        ending, content = mutate(ending, content, random)
        name = f"{number:03d}.{ending}"
        if number % 10 == 9:
            name = f"{number:03d}{NAMES[number // 10 % len(NAMES)]}"
        path = folder / name
        path.write_bytes(content)
        paths.append(path)
    return paths


Mutation = Callable[[str, bytes, np.random.Generator], tuple[str, bytes]]


def _truncated(ending: str, content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    return ending, content[: random.integers(0, len(content))]


def _flipped(ending: str, content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    changed = bytearray(content)
    for position in random.integers(0, len(content), 1 + len(content) // 200):
        changed[position] ^= 1 << random.integers(8)
    return ending, bytes(changed)


def _flipped_head(ending: str, content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    changed = bytearray(content)
    for position in random.integers(4, min(len(content), 200), 6):
        changed[position] = random.integers(256)
    return ending, bytes(changed)


def _zeroed(ending: str, content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    start = int(random.integers(0, len(content)))
    return ending, content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


def _renamed(_: str, content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    return str(random.choice(["png", "jpg", "tif", "webp", "gif", "heic", "jxl", "bmp", "jp2"])), content


def _doubled(ending: str, content: bytes, _: np.random.Generator) -> tuple[str, bytes]:
    return ending, content[: len(content) // 2] + content


def _polyglot(ending: str, content: bytes, _: np.random.Generator) -> tuple[str, bytes]:
    return ending, content + b"PK\3\4" + b"../../evil.txt" + b"<script>alert(1)</script>%PDF-1.7"


def _bomb(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    sides = int(random.integers(20_000, 2**31))
    header = struct.pack(">IIBBBBB", sides, sides, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    return "png", b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def _large_tiff(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    side = int(random.integers(2**16, 2**31))
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 4, 1, side), (279, 4, 1, 100)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return "tif", b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + bytes(100)


def _cyclic_tiff(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """A directory whose next one, and whose EXIF directory, is itself."""
    values = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 150)]
    values += [(277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 4), (34665, 4, 1, 8)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in values)
    next_one = 8 if random.integers(2) else 0
    return "tif", (b"II*\0" + struct.pack("<IH", 8, len(values)) + directory + struct.pack("<I", next_one)).ljust(
        160, b"\x80"
    )


def _huge_text(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """Text that unpacks to 64 MB, in a good picture."""
    path = BytesIO()
    Image.fromarray(noise(8, 8, seed=int(random.integers(100)))).save(path, "PNG")
    content = path.getvalue()
    return "png", content[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))) + content[33:]


def _huge_profile(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    path = BytesIO()
    profile = random.bytes(200_000)
    Image.fromarray(noise(8, 8)).save(path, "JPEG", icc_profile=profile[:16] + b"RGB " + profile[20:])
    return "jpg", path.getvalue()


def _drawing(_: str, __: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    text = '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd" width="9" height="9"/></svg>'
    programs = (text, f"<?xml version='1.0'?>{text}", "%!PS\n(evil) run", "%PDF-1.7\n", "#!/bin/sh\ntouch evil\n")
    return str(random.choice(["svg", "png", "jpg", "tif"])), str(random.choice(programs)).encode()


def _xml_bomb(_: str, __: bytes, ___: np.random.Generator) -> tuple[str, bytes]:
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    xmp = f'<!DOCTYPE x [<!ENTITY a0 "ha">{entities}]><x:xmpmeta xmlns:x="adobe:ns:meta/">&a9;</x:xmpmeta>'
    path = BytesIO()
    Image.fromarray(noise(8, 8)).save(path, "JPEG", xmp=xmp.encode())
    return "jpg", path.getvalue()


def _empty(ending: str, _: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    return ending, random.bytes(int(random.integers(0, 3)))


_MUTATIONS: tuple[Mutation, ...] = (
    _truncated,
    _flipped,
    _flipped_head,
    _zeroed,
    _renamed,
    _flipped,
    _doubled,
    _polyglot,
    _bomb,
    _large_tiff,
    _cyclic_tiff,
    _huge_text,
    _huge_profile,
    _drawing,
    _xml_bomb,
    _flipped_head,
    _empty,
)
