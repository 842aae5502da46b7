"""Picture files of every kind, made by others than the reader's own library: tifffile, Pillow, bare bytes."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(height: int = 37, width: int = 29, channels: int = 3, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    """Random pixels (height, width, channels), or (height, width) for no channel; floats are in [0, 1)."""
    random = np.random.default_rng(seed)
    shape = (height, width, channels) if channels else (height, width)
    if np.issubdtype(dtype, np.floating):
        return random.random(shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def as_rgb(values: np.ndarray) -> np.ndarray:
    """What a reader should give of grey, grey with alpha, RGB or RGBA: colours in three channels, then alpha."""
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] > 2:
        return values
    return np.concatenate([values[..., :1].repeat(3, axis=2), values[..., 1:]], axis=2)


def as_pillow(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, values: np.ndarray, before: bytes = b"", after: bytes = b"") -> None:
    """A PNG file of 8 or 16 bits with further chunks before and after the pixels."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, values.itemsize * 8, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(rows)) + after
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b""))


def write_packed_tiff(path: Path, levels: np.ndarray, bits: int, photometric: int = 1) -> None:
    """A TIFF file of grey levels (height, width) of few bits each, or of 12, packed without gaps."""
    height, width = levels.shape
    rows = ["".join(format(level, f"0{bits}b") for level in row) for row in levels]
    data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    entries = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 122),
        (277, 1),
        (278, height),
    ]
    entries.append((279, len(data)))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + data)


def ink_profile() -> bytes:
    """A profile of CMYK that libvips brings with it."""
    return bytes(pyvips.Operation.call("profile_load", "cmyk"))
