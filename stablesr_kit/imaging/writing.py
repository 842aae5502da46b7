"""Write results to files: one writer for every format, depth and size; a file appears whole or not at all.

libvips encodes, a band of rows at a time: PNG and TIFF of 8 and 16 bits, of any size (BigTIFF if needed), JPEG and WebP
of 8 bits. Alpha, greyness and metadata of the source are kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyvips
from PIL import Image

from stablesr_kit.errors import OutputError
from stablesr_kit.imaging.metadata import add_metadata, lost_in
from stablesr_kit.imaging.reading import Picture, Pixels
from stablesr_kit.storage import replacing_file


class OutputFormat(NamedTuple):
    """A format for results: what it can hold, and how libvips writes it."""

    name: str
    saver: str
    options: Mapping[str, object]
    bits: int
    has_alpha: bool
    longest: int
    """Longest side in pixels."""


_PNG = OutputFormat("PNG", "pngsave", {"filter": "all"}, 16, True, 2**31 - 1)
_JPEG = OutputFormat("JPEG", "jpegsave", {"Q": 95, "subsample_mode": "off"}, 8, False, 65500)
_WEBP = OutputFormat("WEBP", "webpsave", {"Q": 95}, 8, True, 16383)
_TIFF = OutputFormat(
    "TIFF",
    "tiffsave",
    {"tile": True, "tile_width": 256, "tile_height": 256, "compression": "deflate", "predictor": "horizontal"},
    16,
    True,
    2**31 - 1,
)
OUTPUT_FORMATS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".jpe": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _WEBP,
}
_LARGEST_CLASSIC_TIFF = 2**32 - 2**26


def output_format(path: Path) -> OutputFormat:
    """The format of a result, from its name. Raises OutputError if it cannot be written."""
    chosen = OUTPUT_FORMATS.get(path.suffix.lower())
    if chosen is None:
        given = f"suffix {path.suffix!r} is not supported" if path.suffix else "no suffix"
        raise OutputError(f"{path}: {given}; use one of {', '.join(OUTPUT_FORMATS)}")
    return chosen


def check_output(path: Path, source: Picture | None = None, size: tuple[int, int] | None = None) -> None:
    """Raise OutputError if a file of that name cannot hold a source's result of a size (height, width)."""
    chosen = output_format(path)
    if source is not None and source.has_alpha and not chosen.has_alpha:
        raise OutputError(
            f"{path}: {chosen.name} cannot hold the transparency of this picture; use .png, .webp or .tif"
        )
    if size is not None and max(size) > chosen.longest:
        raise OutputError(
            f"{path}: the result would be {size[1]}x{size[0]}, and {chosen.name} holds {chosen.longest} pixels a side "
            "at most; choose .png or .tif, or a smaller result"
        )


def output_dtype(path: Path, source: Picture) -> type[np.uint8] | type[np.uint16]:
    """Dtype of a result's file: that of its source, if the format can hold it. Raises OutputError."""
    return np.uint16 if source.dtype == np.uint16 and output_format(path).bits == 16 else np.uint8


def left_out(path: Path, source: Picture) -> list[str]:
    """Names of what the source has but a result of that name cannot hold. Raises OutputError."""
    chosen = output_format(path)
    lost = lost_in(chosen.name, source.metadata)
    return lost + (["16 bits (8 are kept)"] if source.dtype == np.uint16 and chosen.bits == 8 else [])


def write_picture(
    path: Path,
    restored: Image.Image,
    source: Picture,
    scratch: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a restored RGB picture with 8 bits, see `write_bands`."""
    pixels: Pixels = np.asarray(restored.convert("RGB"))
    if output_dtype(path, source) is np.uint16:
        pixels = pixels.astype(np.uint16) * 257
    height, width, _ = pixels.shape
    write_bands(path, [pixels], height, width, source, scratch, provenance)


def write_bands(
    path: Path,
    bands: Iterable[Pixels],
    height: int,
    width: int,
    source: Picture,
    scratch: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a restored picture with the alpha, greyness and metadata of its source; the suffix is the format.

    The file appears whole or not at all; an older one of that name is replaced.

    bands: RGB from top to bottom, (rows, width, 3) each, of `output_dtype`.
    scratch: folder on the disk of `path` for the unfinished file and the uncompressed rows; None is beside `path`.
    provenance: how the result was made, written into the file.

    Raises OutputError.
    """
    check_output(path, source, (height, width))
    chosen = output_format(path)
    dtype = np.dtype(output_dtype(path, source))
    channels = (1 if source.is_grey else 3) + source.has_alpha
    size = height * width * channels * dtype.itemsize
    options = dict(chosen.options)
    if chosen is _TIFF:
        options["bigtiff"] = size > _LARGEST_CLASSIC_TIFF
    with replacing_file(path, scratch) as part:
        rows, encoded = part.with_suffix(".rows"), part.with_suffix(".pixels")
        try:
            with rows.open("xb") as file:
                for band in _finished(bands, height, width, source, dtype):
                    file.write(band.tobytes())
                if file.tell() != size:
                    raise ValueError(f"{path}: rows of {file.tell()} bytes in all are given, expected {size}")
            image = _raw_image(rows, height, width, channels, source, dtype)
            getattr(image, chosen.saver)(str(encoded), keep="icc", **options)
            rows.unlink()
            add_metadata(encoded, part, chosen.name, source.metadata.with_provenance(provenance, path))
        except pyvips.Error as error:
            reason = " ".join(str(error).split())
            raise OutputError(f"{path}: cannot be written ({reason}); free space or choose another place") from error
        finally:
            rows.unlink(missing_ok=True)
            encoded.unlink(missing_ok=True)


def _finished(
    bands: Iterable[Pixels], height: int, width: int, source: Picture, dtype: np.dtype[Any]
) -> Iterator[Pixels]:
    """The bands with the channels of the file: grey if the source is grey, with enlarged alpha if it has alpha."""
    alpha = _alpha(source, width, dtype) if source.has_alpha else None
    top = 0
    for band in bands:
        if source.is_grey:
            band = _luma(band)
        if alpha is not None:
            box = (0, top * source.height / height, width, (top + len(band)) * source.height / height)
            enlarged = np.asarray(alpha.resize((width, len(band)), Image.Resampling.BICUBIC, box=box))
            enlarged = enlarged.astype(np.float64).round().clip(0, np.iinfo(dtype).max).astype(dtype)
            band = np.concatenate([band, enlarged[..., None]], axis=2)
        top += len(band)
        yield band


def _alpha(source: Picture, width: int, dtype: np.dtype[Any]) -> Image.Image:
    """The source's transparency, all its rows enlarged to `width`; mode F holds 16 bits exactly.

    Rows first, then columns: Pillow enlarges in this order and rounds in between.
    """
    if dtype == np.uint8:
        alpha = source.alpha
        assert alpha is not None
    else:
        alpha = Image.fromarray(np.concatenate([band[..., 3] for band in source.bands()]).astype(np.float32))
    return alpha.resize((width, source.height), Image.Resampling.BICUBIC)


def _luma(band: Pixels) -> Pixels:
    """(rows, width, 1): Rec. 601 luma in the fixed-point numbers of Pillow's convert("L")."""
    red, green, blue = (band[..., channel].astype(np.uint32) for channel in range(3))
    luma = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[..., None]
    return luma.astype(np.uint8) if band.dtype == np.uint8 else luma.astype(np.uint16)


def _raw_image(
    rows: Path, height: int, width: int, channels: int, source: Picture, dtype: np.dtype[Any]
) -> pyvips.Image:
    is_deep = dtype == np.uint16
    interpretation = ("grey16" if is_deep else "b-w") if source.is_grey else ("rgb16" if is_deep else "srgb")
    image = pyvips.Image.rawload(
        str(rows),
        width,
        height,
        channels,
        format="ushort" if is_deep else "uchar",
        interpretation=interpretation,
        access="sequential",
    ).copy()
    if source.metadata.icc_profile is not None:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", source.metadata.icc_profile)
    return image
