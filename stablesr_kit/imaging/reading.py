"""Reading pictures: one reader for every format, depth and layout, of any size.

libvips decodes, a band of rows at a time: PNG, JPEG, TIFF, WebP, GIF and AVIF, and JPEG XL and JPEG 2000 where the
libvips of this machine supports them. Pillow decodes the rest, as a whole: BMP, PNM, JPEG 2000, 8-bit CIELAB, and HEIC
and JPEG XL with extra `formats`. The format is detected from the content of a file, never from its name.

Files are untrusted. Only these raster formats are opened (nothing that runs a program), sizes are limited before pixels
are decoded, and every failure is one ImageError with a one-line message.

Pixels are upright RGB of 8 or 16 bits. Alpha, metadata, and whether the file is grey, are kept beside them.
`Picture.notes` says what was converted or left out.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyvips
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.finding import READ_FORMATS, START, format_of
from stablesr_kit.imaging.metadata import (
    Described,
    Metadata,
    cmyk_to_srgb,
    describe,
    inks_to_rgb,
    is_profile_of,
    lab_to_srgb,
    read_metadata,
)

MAX_PIXELS = 100_000_000
"""Limit for pictures of unknown origin: larger ones may be an attack on memory and disk."""
MAX_STREAMED_PIXELS = 2**32
BAND_ROWS = 256

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

_LOADERS = {
    "AVIF": "heifload",
    "GIF": "gifload",
    "HEIC": "heifload",
    "JPEG": "jpegload",
    "JPEG 2000": "jp2kload",
    "JPEG XL": "jxlload",
    "PNG": "pngload",
    "TIFF": "tiffload",
    "WEBP": "webpload",
}
_PILLOW_NAMES = {"BMP": "BMP", "HEIC": "HEIF", "JPEG 2000": "JPEG2000", "JPEG XL": "JXL", "PNM": "PPM", "TIFF": "TIFF"}
_PLUGINS = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl"}

_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB")
_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _EXTRA_SAMPLES, _RAW_VERSION = 254, 258, 262, 338, 50706
_SAMPLES, _PLANES, _INK_SET, _NUMBER_KIND = 277, 284, 332, 339
_WHITE_IS_ZERO, _SEPARATED, _CIELAB, _COLOUR_FILTER_ARRAY, _LINEAR_RAW = 0, 5, 8, 32803, 34892

# No caching of loaded files: a file may change while a program runs.
pyvips.cache_set_max(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture, upright: what is known without decoding, and its pixels in bands of rows."""

    height: int
    width: int
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
    """Dtype of the bands; white is its largest value."""
    has_alpha: bool
    is_grey: bool
    """True if the file has one colour channel: bands repeat it three times, and the result's file has one, too."""
    metadata: Metadata
    notes: tuple[str, ...] = ()
    """What was converted or left out on reading, one phrase each, for the user."""
    decode: Callable[[int], Iterator[Pixels]]
    """Number of rows -> bands of that many rows, from top to bottom; see `bands`."""

    def bands(self, rows: int = BAND_ROWS) -> Iterator[Pixels]:
        """RGB, or RGBA if `has_alpha`, from top to bottom: (rows, width, 3 or 4) each, the last one maybe fewer rows.

        Raises ImageError where the file turns out truncated or damaged.
        """
        return self.decode(rows)

    def holding(self, pixels: Pixels) -> "Picture":
        """The same picture with other pixels (height, width, 3 or 4), which are in memory."""
        return replace(self, height=pixels.shape[0], width=pixels.shape[1], decode=lambda rows: _rows_of(pixels, rows))

    @cached_property
    def pixels(self) -> Pixels:
        """All pixels, (height, width, 3 or 4). Raises ImageError as `bands`."""
        return np.concatenate(list(self.bands()))

    @cached_property
    def rgb(self) -> Image.Image:
        """Mode RGB, in 8 bits. Raises ImageError as `bands`."""
        return Image.fromarray(_eight_bit(self.pixels[..., :3]))

    @cached_property
    def alpha(self) -> Image.Image | None:
        """Mode L, in 8 bits; None if there is no transparency."""
        return Image.fromarray(_eight_bit(self.pixels[..., 3])) if self.has_alpha else None


def read_picture(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a file, or in its content, decoded. Raises ImageError as `open_picture` and `Picture.bands`."""
    picture = open_picture(source, max_pixels=max_pixels)
    return picture.holding(picture.pixels)


def open_picture(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, advice: str = "scale or crop it first"
) -> Picture:
    """The picture in a file, or in its content, of one of `READ_FORMATS` and of at most `max_pixels` pixels.

    Of most formats only the header is read now, and pixels when they are needed. advice: what to do with larger ones.

    Raises:
        ImageError: there is no such file, or it is not a picture, truncated, empty, too large, or of a kind that is
            not read.
    """
    name = "" if isinstance(source, bytes) else f"{source}: "
    with _in_one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow may warn about a broken file; the user gets our one line
        kind, limit = _kind(source), _Limit(max_pixels, advice)
        if kind == "TIFF" or _has_loader(kind):
            opened = _open_with_vips(source, kind, limit, name)
            if opened is not None:
                return opened
        return _open_with_pillow(source, kind, limit)


def as_picture(image: Image.Image) -> Picture:
    """The picture in a Pillow image of any mode, as if it were read from a file.

    Raises ImageError if the colour mode is not supported, or grey values are out of range.
    """
    if not (image.mode in _COLOUR_MODES or _is_grey_mode(image)):
        raise ImageError(f"colour mode {image.mode} is not supported; convert it to RGB first")
    is_grey = _is_grey_mode(image)
    described = describe(image, is_grey)
    notes = list(described.notes)
    # The second picture in a phone's JPEG (MPO) is a depth or gain map, not a frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append("only its first frame or page is used")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF has no orientation
        pass
    metadata = described.metadata
    pixels: Pixels
    if image.mode == "CMYK":
        pixels = np.asarray(cmyk_to_srgb(image, metadata.icc_profile))
    elif image.mode == "LAB":
        pixels = np.asarray(lab_to_srgb(image))
        notes.append(_OF_LAB)
    elif _is_deep_grey(image):
        values = np.asarray(image)
        pixels = _levels(values if image.mode == "F" else values.astype(np.int32))[..., None].repeat(3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return _in_memory(pixels, is_grey, metadata, notes, is_converted=image.mode in ("CMYK", "LAB"))


_OF_LAB = "CIELAB becomes sRGB"


class _Limit(NamedTuple):
    max_pixels: int
    advice: str

    def check(self, width: int, height: int) -> None:
        """Raise ImageError for an empty picture, or one that is larger than allowed."""
        if width < 1 or height < 1:
            raise ImageError(f"{width}x{height} pixels; a picture has at least one")
        if width * height > self.max_pixels:
            raise ImageError(
                f"{width}x{height} is {width * height / 1e6:.0f} million pixels, "
                f"more than the limit of {self.max_pixels / 1e6:g}; {self.advice}"
            )


def _open_with_vips(source: Path | bytes, kind: str, limit: _Limit, name: str) -> Picture | None:
    """The picture, to be decoded by libvips; None if only Pillow reads this kind."""
    described = _describe(source, kind, is_grey=False)
    tags = described.tags or {}
    if tags:
        _refuse_raw(tags)
        if (_first(tags.get(_BITS)), _first(tags.get(_NUMBER_KIND)), tags.get(_PLANES)) == (16, 3, 2):
            raise ImageError("16-bit float numbers in separate planes are not read; convert it to 32-bit float")
    bits = _first(tags.get(_BITS))
    if bits == 12 and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ImageError("12-bit numbers whose white is zero are not read; convert it to TIFF of 16 bits")
    if (tags.get(_PHOTOMETRIC) == _CIELAB and bits == 8) or (tags.get(_SAMPLES, 1) == 1 and bits == 12):
        return None
    is_upright = described.orientation == 1 or kind in ("AVIF", "HEIC")  # libheif turns them
    header = _loaded(source, kind, is_upright)
    limit.check(header.width, header.height)
    notes = list(described.notes)
    if header.get_typeof("n-pages") and header.get("n-pages") > 1:
        notes.append("only its first frame or page is used")
    colours = _colours(header, tags, described.metadata.icc_profile)
    notes += [colours.note] if colours.note else []
    is_grey = colours.channels == 1
    if is_grey and kind == "PNG":  # the profile made of a gamma is another one
        described = _describe(source, kind, is_grey)
    extra = header.bands - colours.channels
    has_alpha = extra > 0 and (kind != "TIFF" or _first(tags.get(_EXTRA_SAMPLES)) in (1, 2))
    if extra > has_alpha:
        notes.append(f"{extra - has_alpha} of its {header.bands} channels are neither colour nor alpha and left out")

    def decode(rows: int) -> Iterator[Pixels]:
        with _in_one_line(name):
            image = colours.convert(_loaded(source, kind, is_upright))
            if not is_upright:
                image = image.copy()
                image.set_type(pyvips.GValue.gint_type, "orientation", described.orientation)
                image = image.autorot()
            region = pyvips.Region.new(image)
            for top in range(0, image.height, rows):
                count = min(rows, image.height - top)
                band = np.frombuffer(region.fetch(0, top, image.width, count), _NUMBERS[image.format])
                band = band.reshape(count, image.width, image.bands)
                rgb = colours.to_rgb(_levels(band[..., : colours.kept]))
                yield np.concatenate([rgb, _levels(band[..., colours.kept, None])], axis=2) if has_alpha else rgb

    metadata, profile_notes = _with_own_profile(described.metadata, is_grey, colours.is_converted)
    sides = (header.height, header.width)
    is_lying = not is_upright and described.orientation > 4
    return Picture(
        height=sides[is_lying],
        width=sides[not is_lying],
        dtype=np.dtype(np.uint8) if header.format == "uchar" else np.dtype(np.uint16),
        has_alpha=has_alpha,
        is_grey=is_grey,
        metadata=metadata,
        notes=(*notes, *profile_notes),
        decode=decode,
    )


class _Colours(NamedTuple):
    """How the channels of a file become RGB."""

    channels: int
    """Of the file, that are colours or inks; what follows them may be alpha."""
    kept: int
    """Number of channels that are passed to `convert`."""
    to_rgb: Callable[[Pixels], Pixels]
    """From a band (rows, width, kept) to (rows, width, 3)."""
    convert: Callable[[pyvips.Image], pyvips.Image] = lambda image: image
    """What libvips does first."""
    is_converted: bool = False
    """Whether the pixels are converted to another colour space, so that the profile no longer applies."""
    note: str | None = None


def _colours(header: pyvips.Image, tags: Mapping[int, Any], profile: bytes | None) -> _Colours:
    if header.interpretation == "cmyk" or tags.get(_PHOTOMETRIC) == _SEPARATED:
        return _inks(header, tags, profile)
    if tags.get(_PHOTOMETRIC) == _CIELAB:
        return _Colours(3, 3, lambda band: band, _from_lab, is_converted=True, note=_OF_LAB)
    if header.format not in _NUMBERS or header.format == "short":
        raise ImageError(
            f"its numbers are of type {header.format}; expected unsigned ones of 8, 16 or 32 bits, or float"
        )
    note = _REDUCED.get(header.format)
    if header.bands < 3 and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and header.format in ("int", "float"):
        return _Colours(1, 1, lambda band: 65535 - band.repeat(3, axis=2), note=note)  # libvips inverts the others
    if header.bands < 3:
        return _Colours(1, 1, lambda band: band.repeat(3, axis=2), note=note)
    return _Colours(3, 3, lambda band: band, note=note)


def _inks(header: pyvips.Image, tags: Mapping[int, Any], profile: bytes | None) -> _Colours:
    if header.bands < 4 or header.format not in ("uchar", "ushort") or tags.get(_INK_SET, 1) != 1:
        raise ImageError("its inks are not read; expected CMYK of 8 or 16 bits: convert it first")
    depth = 16 if header.format == "ushort" else 8

    def convert(image: pyvips.Image) -> pyvips.Image:
        inks = image.extract_band(0, n=4).copy(interpretation="cmyk")
        inks.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
        rgb = inks.icc_transform("srgb", embedded=True, intent="perceptual", depth=depth)
        return rgb if image.bands == 4 else rgb.bandjoin(image.extract_band(4, n=image.bands - 4))

    if profile and is_profile_of(profile, b"CMYK"):
        try:
            convert(pyvips.Image.black(1, 1, bands=header.bands).cast(header.format)).avg()
        except pyvips.Error:
            pass
        else:
            return _Colours(4, 3, lambda band: band, convert, True, "CMYK becomes sRGB by its profile")
    rule = "CMYK without a usable profile becomes RGB by (1 - ink)(1 - black)"
    return _Colours(4, 4, inks_to_rgb, is_converted=True, note=rule)


def _from_lab(image: pyvips.Image) -> pyvips.Image:
    """16-bit sRGB of CIELAB (D50); further channels stay unchanged."""
    lab = (
        image.extract_band(0, n=3).copy(interpretation="lab" if image.format == "float" else "labs").colourspace("lab")
    )
    rgb = lab.icc_export(output_profile="srgb", intent="perceptual", depth=16)
    return rgb if image.bands == 3 else rgb.bandjoin(image.extract_band(3, n=image.bands - 3).cast("ushort"))


def _open_with_pillow(source: Path | bytes, kind: str, limit: _Limit) -> Picture:
    """The picture, decoded by Pillow."""
    plugin = _PLUGINS.get(kind)
    if kind not in _PILLOW_NAMES or (plugin is not None and find_spec(plugin) is None):
        raise ImageError(f"{kind} is not read here; pip install 'stablesr-kit[formats]', or convert it to PNG or TIFF")
    if plugin is not None:
        module = import_module(plugin)
        if hasattr(module, "register_heif_opener"):
            module.register_heif_opener()
    with _file(source) as file, Image.open(file, formats=[_PILLOW_NAMES[kind]]) as image:
        limit.check(image.width, image.height)
        # Pillow reduces 16-bit colour on loading; until then the decoder's raw mode ("RGB;16B") tells.
        is_reduced = any(";16" in str(tile[3]) for tile in image.tile) or image.info.get("bit_depth", 8) > 8
        is_reduced |= _bits_of_jpeg_2000(file) > 8 if kind == "JPEG 2000" else _largest(image) > 255
        image.load()
        picture = as_picture(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _first(image.tag_v2.get(_BITS)) == 12:
            picture = picture.holding(_levels(picture.pixels.astype(np.float32) / 4095))
        if is_reduced and picture.dtype == np.uint8:
            picture = replace(picture, notes=(*picture.notes, "more than 8 bits per channel are reduced to 8"))
        return picture


def _largest(image: Image.Image) -> int:
    """The value of white in a PNM file, which Pillow scales to 8 bits in colour; 0 in other formats."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PPM" or not image.tile:
        return 0
    arguments = image.tile[0][3]
    last = arguments[-1] if isinstance(arguments, tuple) else None
    return last if isinstance(last, int) else 0


def _bits_of_jpeg_2000(file: IO[bytes]) -> int:
    """Bits of the first channel, as the codestream's SIZ marker says (ISO/IEC 15444-1, A.5.1); 8 if it is not found."""
    place = file.tell()
    file.seek(0)
    content = file.read(2**20)
    file.seek(place)
    start = content.find(b"\xff\x4f\xff\x51")
    depth = content[start + 42 : start + 43] if start >= 0 else b""
    return (depth[0] & 0x7F) + 1 if depth else 8


_NUMBERS: dict[str, Any] = {
    "uchar": np.uint8,
    "ushort": np.uint16,
    "short": np.int16,
    "uint": np.uint32,
    "int": np.int32,
    "float": np.float32,
}
_REDUCED = {
    "uint": "32 bits per channel become 16",
    "int": "32-bit numbers from 0 to 65535 are taken as 16 bits",
    "float": "numbers from 0 to 1 become 16 bits, as they are: linear light stays linear",
}


def _levels(values: NDArray[Any]) -> Pixels:
    """Levels of 8 or 16 bits of unsigned numbers, of signed ones from 0 to 65535, or of floats from 0 to 1.

    Raises ImageError for numbers out of range.
    """
    if values.dtype in (np.uint8, np.uint16):
        return values
    if values.dtype == np.uint32:
        return (values // 65537 + (values % 65537 > 32768)).astype(np.uint16)
    white = 65535.0 if values.dtype == np.int32 else 1.0
    low, high = values.min(), values.max()
    if not (np.isfinite(values).all() and low >= 0 and high <= white):
        raise ImageError(
            f"its {'float' if white == 1 else 'signed'} numbers go from {low:g} to {high:g}, expected 0 (black) to "
            f"{white:g} (white); scale them, or save it with 8 or 16 bits"
        )
    return (values.astype(np.float64) * (65535 / white)).round().astype(np.uint16)


def _eight_bit(pixels: Pixels) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _rows_of(pixels: Pixels, rows: int) -> Iterator[Pixels]:
    return (pixels[top : top + rows] for top in range(0, len(pixels), rows))


def _in_memory(
    pixels: Pixels, is_grey: bool, metadata: Metadata, notes: Sequence[str], is_converted: bool = False
) -> Picture:
    metadata, profile_notes = _with_own_profile(metadata, is_grey, is_converted)
    return Picture(
        height=pixels.shape[0],
        width=pixels.shape[1],
        dtype=pixels.dtype,
        has_alpha=pixels.shape[2] == 4,
        is_grey=is_grey,
        metadata=metadata,
        notes=(*notes, *profile_notes),
        decode=lambda rows: _rows_of(pixels, rows),
    )


def _with_own_profile(metadata: Metadata, is_grey: bool, is_converted: bool) -> tuple[Metadata, tuple[str, ...]]:
    """The metadata without a profile that does not fit the pixels, and notes about it."""
    profile = metadata.icc_profile
    if is_converted:
        return replace(metadata, icc_profile=None), ()
    if profile is None or is_profile_of(profile, b"GRAY" if is_grey else b"RGB "):
        return metadata, ()
    return replace(metadata, icc_profile=None), ("its colour profile is of another kind of pixels and is left out",)


def _describe(source: Path | bytes, kind: str, is_grey: bool) -> Described:
    with _file(source) as file:
        return read_metadata(file, kind, is_grey)


def _loaded(source: Path | bytes, kind: str, is_upright: bool) -> pyvips.Image:
    """The stored picture, not decoded yet; it can be read in rows if it is not turned."""
    options = {"access": "sequential" if is_upright else "random", "fail_on": "error"}
    if isinstance(source, bytes):
        return getattr(pyvips.Image, f"{_LOADERS[kind]}_buffer")(source, **options)
    return getattr(pyvips.Image, _LOADERS[kind])(str(source), **options)


def _has_loader(kind: str) -> bool:
    return kind in _LOADERS and bool(pyvips.type_find("VipsOperation", _LOADERS[kind])) and kind != "HEIC"


def _kind(source: Path | bytes) -> str:
    if isinstance(source, Path):
        if not source.exists():
            raise ImageError("no such file or folder; check the name")
        if not source.is_file():
            raise ImageError("a folder or device, not a picture; give a picture file")
    with _file(source) as file:
        start = file.read(START)
    kind = format_of(start)
    if kind is None:
        given = "not a picture of a format that is read, or damaged" if start else "an empty file"
        raise ImageError(f"{given}; give one of {', '.join(READ_FORMATS)}")
    return kind


def _file(source: Path | bytes) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _refuse_raw(tags: Mapping[int, Any]) -> None:
    """Raise ImageError for raw camera files, whose first picture is a thumbnail or not developed."""
    is_undeveloped = tags.get(_PHOTOMETRIC) in (_COLOUR_FILTER_ARRAY, _LINEAR_RAW)
    if _RAW_VERSION in tags or is_undeveloped:
        raise ImageError("a camera's raw file, not a developed picture; develop it to TIFF or JPEG first")
    if tags.get(_SUBFILE_TYPE, 0) == 1:
        raise ImageError(
            "its first picture is only a thumbnail, as in a camera's raw file; develop it to TIFF or JPEG first"
        )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _is_grey_mode(image: Image.Image) -> bool:
    """True if the picture has one colour channel of any depth."""
    return image.mode in ("1", "L", "LA") or _is_deep_grey(image)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turn all errors of decoders into an ImageError that begins with the name."""
    try:
        yield
    except ImageError as error:
        if name and str(error).startswith(name):
            raise
        raise ImageError(f"{name}{error}") from error
    except PermissionError as error:
        raise ImageError(f"{name}may not be read; change its permissions") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}truncated or damaged; get a whole copy of it") from error
    except Image.DecompressionBombError as error:
        exceeded, _, _ = str(error).partition(",")
        raise ImageError(f"{name}{exceeded}; scale or crop it first") from error
    # OSError, SyntaxError, ValueError, struct.error, zlib.error, pyvips.Error and more.
    except Exception as error:
        reason = _reason(error)
        for part, meaning in _UNSUPPORTED.items():
            if part in reason:
                raise ImageError(f"{name}{meaning}; convert it to PNG, or to TIFF of 8 or 16 bits") from error
        raise ImageError(f"{name}truncated or damaged ({reason}); get a whole copy of it") from error


# Messages of libvips for intact files that it does not support.
_UNSUPPORTED = {
    "tiled separate planes": "its colours lie in separate planes of tiles",
    "not a whole number of bytes": "its numbers are of a depth that is not read",
    "samples out of range": "its numbers are of a depth that is not read",
    "unsupported tiff image type": "its kind of TIFF is not read",
    "not supported": "its coding is not read",
    "is not configured": "its compression is not read",
}


def _reason(error: Exception) -> str:
    """The last line of libvips' log of an error, which names its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
