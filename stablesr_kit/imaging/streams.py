"""Pictures larger than memory or deeper than 8 bits: read and written a band of rows at a time.

Colours, transparency, profiles and orientation mean what they mean in `files.py`; 16 bits per channel stay 16. Bands
come from libvips (extra `huge`), which decodes PNG, JPEG and TIFF of any tiling and compression by rows and encodes PNG
and TIFF (BigTIFF above 4 GB) likewise. A picture that must be turned upright is first decoded to a temporary file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from stablesr_kit.errors import ImageError, OutputError
from stablesr_kit.imaging.files import cmyk_to_srgb, descriptive_exif, is_grey_mode, is_profile_of, replacing

if TYPE_CHECKING:
    import pyvips

MAX_STREAMED_PIXELS = 2**32
BAND_ROWS = 256

# First bytes of a file -> readers of its header and of its pixels; nothing else is opened.
_READERS: dict[bytes, tuple[type[Any], str]] = {
    b"\x89PNG": (PngImagePlugin.PngImageFile, "pngload"),
    b"\xff\xd8": (JpegImagePlugin.JpegImageFile, "jpegload"),
    b"II*\0": (TiffImagePlugin.TiffImageFile, "tiffload"),
    b"MM\0*": (TiffImagePlugin.TiffImageFile, "tiffload"),
    b"II+\0": (TiffImagePlugin.TiffImageFile, "tiffload"),
    b"MM\0+": (TiffImagePlugin.TiffImageFile, "tiffload"),
}
_WRITERS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("pngsave", {"filter": "sub"}),
    ".tif": ("tiffsave", {"tile": True, "tile_width": 256, "tile_height": 256, "compression": "deflate"}),
}
_WRITERS[".tiff"] = _WRITERS[".tif"]


class StreamHeader(NamedTuple):
    """What the first bytes of a file say of a picture that can be streamed, maybe; nothing is decoded."""

    height: int
    """As stored: the upright picture may be as wide as this."""
    width: int
    is_16_bit: bool


def read_header(path: Path) -> StreamHeader | None:
    """The header of a PNG, JPEG or TIFF file, without libvips; None for any other file, damaged ones among them."""
    try:
        header_class, _ = _readers(path)
        with header_class(path) as header:
            is_16_bit = header.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in header.tile)
            return StreamHeader(header.height, header.width, is_16_bit)
    except Exception:  # whoever reads the picture says what is wrong with it
        return None


def has_streams() -> bool:
    """Whether libvips is installed."""
    return find_spec("pyvips") is not None


@dataclass(frozen=True, kw_only=True)
class StreamedPicture:
    """A picture in a file, upright: what is known of it without decoding, and its pixels by bands."""

    path: Path
    height: int
    width: int
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
    """Numbers of the bands; white is their largest."""
    has_alpha: bool
    is_grey: bool
    """True if the file is grey: the bands repeat it in three channels, and so is the result."""
    icc_profile: bytes | None
    """Colour profile of the bands; None stands for sRGB."""
    exif: bytes | None
    """As in `files.Picture`."""
    notes: tuple[str, ...] = ()
    """As in `files.Picture`."""

    def bands(self, rows: int = BAND_ROWS) -> Iterator[np.ndarray]:
        """RGB, or RGBA if `has_alpha`, from top to bottom: (rows, width, 3 or 4) each, the last one maybe fewer rows.

        Raises ImageError where the file turns out truncated or damaged.
        """
        vips = _vips()
        header, pixels = _opened(self.path)
        try:
            region = vips.Region.new(pixels)
            for top in range(0, self.height, rows):
                n = min(rows, self.height - top)
                band = np.frombuffer(region.fetch(0, top, self.width, n), self.dtype).reshape(n, self.width, -1)
                yield self._as_rgb(band, header)
        except vips.Error as error:
            raise _damaged(self.path, error) from error

    def _as_rgb(self, band: np.ndarray, header: Image.Image) -> np.ndarray:
        if header.mode == "CMYK":
            return np.asarray(cmyk_to_srgb(Image.fromarray(band, "CMYK"), header.info.get("icc_profile")))
        colours = band[..., :3] if band.shape[2] >= 3 else band[..., :1].repeat(3, axis=2)
        return np.concatenate([colours, band[..., -1:]], axis=2) if self.has_alpha else colours


def open_stream(path: Path, *, max_pixels: int = MAX_STREAMED_PIXELS) -> StreamedPicture:
    """The PNG, JPEG or TIFF picture in a file of 8 or 16 bits per channel; decodes no pixels.

    Raises ImageError for what `files.read_picture` refuses, for other formats and depths, and without libvips.
    """
    vips = _vips()
    header, pixels = _opened(path)
    if pixels.width * pixels.height > max_pixels:
        raise ImageError(
            f"{path}: {pixels.width}x{pixels.height} is {pixels.width * pixels.height / 1e6:.0f} million pixels, "
            f"more than the limit of {max_pixels / 1e6:.0f}; scale or crop it first"
        )
    if pixels.format not in ("uchar", "ushort"):
        raise ImageError(f"{path}: numbers of type {pixels.format} are not streamed; convert it to 8 or 16 bits first")
    is_cmyk = header.mode == "CMYK"
    # Pillow has no mode for grey of 16 bits with alpha and calls it RGBA.
    is_grey = is_grey_mode(header) or (pixels.format == "ushort" and pixels.bands < 3)
    profile = header.info.get("icc_profile")
    notes = ["only its first frame or page is used"] if getattr(header, "is_animated", False) else []
    try:
        exif = descriptive_exif(header)
    except Exception:  # EXIF is free-form bytes: any parser error means it is not readable
        exif = None
        notes.append("EXIF cannot be read and is left out")
    return StreamedPicture(
        path=path,
        height=pixels.height,
        width=pixels.width,
        dtype=np.dtype(np.uint8) if pixels.format == vips.BandFormat.UCHAR else np.dtype(np.uint16),
        has_alpha=not is_cmyk and header.has_transparency_data and pixels.hasalpha(),
        is_grey=is_grey,
        icc_profile=profile if profile and is_profile_of(profile, b"GRAY" if is_grey else b"RGB ") else None,
        exif=exif,
        notes=tuple(notes),
    )


def write_stream(
    path: Path,
    bands: Iterable[np.ndarray],
    height: int,
    width: int,
    source: StreamedPicture,
    scratch: Path | None = None,
) -> None:
    """Write a restored picture, whole or not at all, with the alpha, greyness, profile and EXIF of its source.

    bands: RGB from top to bottom, (rows, width, 3) each, of the source's numbers.
    path: PNG or TIFF; TIFF keeps no EXIF.
    scratch: a folder on the disk of `path` for the unfinished file and the uncompressed rows; None is beside `path`.

    Raises OutputError.
    """
    vips = _vips()
    check_streamed_output(path)
    saver, options = _WRITERS[path.suffix.lower()]
    channels = (1 if source.is_grey else 3) + source.has_alpha
    size = height * width * channels * source.dtype.itemsize
    if saver == "tiffsave":
        options = {**options, "bigtiff": size > 2**32 - 2**26, "predictor": "horizontal"}
    with replacing(path, scratch) as part:
        rows = part.with_suffix(".rows")
        try:
            with rows.open("xb") as file:
                for band in _finished(bands, height, width, source):
                    file.write(band.tobytes())
                if file.tell() != size:
                    raise ValueError(f"{path}: rows of {file.tell()} bytes in all are given, expected {size}")
            getattr(_as_vips(rows, height, width, channels, source), saver)(str(part), **options)
        except vips.Error as error:
            raise OutputError(
                f"{path}: cannot be written ({_reason(error)}); free space or choose another place"
            ) from error
        finally:
            rows.unlink(missing_ok=True)


def is_streamed_output(path: Path) -> bool:
    """Whether the suffix names a format that can be written by rows."""
    return path.suffix.lower() in _WRITERS


def check_streamed_output(path: Path) -> None:
    """Raise OutputError if the suffix names no format that can be written by rows."""
    if not is_streamed_output(path):
        raise OutputError(
            f"{path}: a picture this large or deep is written as {', '.join(_WRITERS)} only; choose one of them"
        )


def _finished(bands: Iterable[np.ndarray], height: int, width: int, source: StreamedPicture) -> Iterator[np.ndarray]:
    """The bands in the channels of the file: made grey, and with the enlarged alpha, where the source is so."""
    alpha = _alpha(source, width) if source.has_alpha else None
    top = 0
    for band in bands:
        if source.is_grey:
            band = _luma(band)
        if alpha is not None:
            box = (0, top * source.height / height, width, (top + len(band)) * source.height / height)
            enlarged = np.asarray(alpha.resize((width, len(band)), Image.Resampling.BICUBIC, box=box))
            white = np.iinfo(source.dtype).max
            enlarged = enlarged.astype(np.float64).round().clip(0, white).astype(source.dtype)
            band = np.concatenate([band, enlarged[..., None]], axis=2)
        top += len(band)
        yield band


def _alpha(source: StreamedPicture, width: int) -> Image.Image:
    """The source's transparency, all its rows enlarged to `width`; mode F holds 16 bits exactly.

    Rows first, then columns, is the order in which Pillow enlarges, which rounds in between.
    """
    alpha = np.concatenate([band[..., 3] for band in source.bands()])
    image = Image.fromarray(alpha if source.dtype == np.uint8 else alpha.astype(np.float32))
    return image.resize((width, source.height), Image.Resampling.BICUBIC)


def _luma(band: np.ndarray) -> np.ndarray:
    """(rows, width, 1): Rec. 601 luma in the fixed-point numbers of Pillow's convert("L")."""
    red, green, blue = (band[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(band.dtype)[..., None]


def _as_vips(rows: Path, height: int, width: int, channels: int, source: StreamedPicture) -> "pyvips.Image":
    vips = _vips()
    is_deep = source.dtype == np.uint16
    interpretation = ("grey16" if is_deep else "b-w") if source.is_grey else ("rgb16" if is_deep else "srgb")
    image = vips.Image.rawload(
        str(rows),
        width,
        height,
        channels,
        format="ushort" if is_deep else "uchar",
        interpretation=interpretation,
        access="sequential",
    ).copy()
    if source.icc_profile is not None:
        image.set_type(vips.GValue.blob_type, "icc-profile-data", source.icc_profile)
    if source.exif is not None:
        image.set_type(vips.GValue.blob_type, "exif-data", source.exif)
    return image


def _opened(path: Path) -> tuple[Image.Image, "pyvips.Image"]:
    """The header as Pillow reads it, and the upright pixels as libvips will. Raises ImageError."""
    vips = _vips()
    try:
        header_class, loader = _readers(path)
        header = header_class(path)  # Image.open would refuse its size
        if header.mode in ("RGBa", "LAB"):
            raise ImageError(f"{path}: colour mode {header.mode} is not supported; convert it to RGB first")
        is_upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
        load = getattr(vips.Image, loader)
        pixels = load(str(path), access="sequential" if is_upright else "random", fail_on="error")
        return header, pixels if is_upright else pixels.autorot()
    except ImageError:
        raise
    except OSError as error:
        if error.strerror is None:  # how Pillow says what is wrong with a file
            raise _damaged(path, error) from error
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the name and its permissions") from error
    except Exception as error:  # broken headers: SyntaxError, ValueError, struct.error, pyvips.Error and more
        raise _damaged(path, error) from error


def _readers(path: Path) -> tuple[type[Any], str]:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, readers in _READERS.items():
        if start.startswith(magic):
            return readers
    raise ImageError(f"{path}: not a picture that can be streamed; give PNG, JPEG or TIFF")


def _damaged(path: Path, error: Exception) -> ImageError:
    return ImageError(f"{path}: truncated or damaged ({_reason(error)}); get a whole copy of it")


def _reason(error: Exception) -> str:
    """The last line of libvips' log of an error, which names its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _vips() -> Any:
    try:
        import pyvips
    except ImportError as error:
        raise ImageError(
            "a picture this large or deep needs libvips, which is not installed: pip install 'stablesr-kit[huge]'"
        ) from error
    return pyvips
