"""Colour profiles: matching them to pixels, making them from gamma and chromaticities, and conversion to sRGB."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SRGB_GAMMA = 0.45455
SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""(x, y) of white, red, green and blue, in the order of PNG's cHRM."""

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def is_profile_of(profile: bytes, colour_space: bytes) -> bool:
    """True if the header of the ICC profile names this colour space (four bytes at offset 16)."""
    return profile[16:20] == colour_space


def profile_from(gamma: float | None, chromaticities: tuple[float, ...] | None, is_grey: bool = False) -> bytes | None:
    """An ICC profile (v2, matrix and curve) of pixels with a file gamma and chromaticities, as PNG's gAMA and cHRM.

    None if they are those of sRGB, within 1 % of gamma and 0.005 of a chromaticity. Missing values are sRGB's.

    Raises:
        ValueError: they describe no colour space.
    """
    gamma = SRGB_GAMMA if gamma is None else gamma
    chromaticities = SRGB_CHROMATICITIES if chromaticities is None or is_grey else chromaticities
    if not (0.01 < gamma < 100 and len(chromaticities) == 8 and min(chromaticities[1::2]) > 0):
        raise ValueError(f"a gamma of {gamma} with chromaticities {chromaticities} describes no colours")
    is_srgb = np.allclose(chromaticities, SRGB_CHROMATICITIES, atol=0.005)
    if is_srgb and abs(gamma / SRGB_GAMMA - 1) < 0.01:
        return None
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 / gamma)) + bytes(2)
    description = b"desc" + bytes(4) + struct.pack(">I", 11) + b"from a PNG\0" + bytes(78)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"CC0\0", b"wtpt": _xyz(_D50)}
    if is_grey:
        tags |= {b"kTRC": curve}
    else:
        columns = _primaries_in_d50(chromaticities).T
        tags |= {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), columns, strict=True)}
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    return _assembled(tags, b"GRAY" if is_grey else b"RGB ")


def inks_to_rgb(inks: NDArray[Any]) -> NDArray[Any]:
    """RGB (..., 3) of CMYK (..., 4) without a profile, of 8 or 16 bits: (1 - ink)(1 - black), rounded as in Pillow."""
    white = np.iinfo(inks.dtype).max
    light = (white - inks[..., 3:]).astype(np.uint64)
    absorbed = (inks[..., :3] * light + white // 2) // white
    rgb: NDArray[Any] = (light - absorbed).astype(inks.dtype)
    return rgb


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """sRGB of a Pillow image in mode LAB (CIELAB, D50)."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def cmyk_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB of a Pillow image in mode CMYK by its own ink profile; without a usable one, as `inks_to_rgb`."""
    if profile and is_profile_of(profile, b"CMYK"):
        try:
            inks = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _primaries_in_d50(chromaticities: tuple[float, ...]) -> NDArray[np.float64]:
    """XYZ of red, green and blue in columns, adapted from their own white to D50 (Bradford)."""
    x, y = np.array(chromaticities[::2]), np.array(chromaticities[1::2])
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    white, primaries = xyz[:, 0], xyz[:, 1:]
    try:
        primaries = primaries * np.linalg.solve(primaries, white)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"chromaticities {chromaticities} describe no colours") from error
    cone = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    return np.linalg.inv(_BRADFORD) @ cone @ _BRADFORD @ primaries


def _xyz(values: NDArray[np.float64]) -> bytes:
    fixed = (values * 65536).round().clip(-(2**31), 2**31 - 1).astype(int)
    return b"XYZ " + bytes(4) + struct.pack(">3i", *fixed)


def _assembled(tags: dict[bytes, bytes], colour_space: bytes) -> bytes:
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02100000, b"mntr", colour_space, b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(_D50)[8:] + bytes(48)
    return header + table + data
