"""Pictures as files: read any photo safely, write a result whole or not at all.

Files are untrusted. Only plain raster formats are opened (no EPS, PDF or anything else that runs a program), sizes are
limited before pixels are decoded, and whatever goes wrong is one `ImageError` or `OutputError` with a one-line message.

The toolkit works on 8-bit RGB. What a file has beyond that is kept beside the pixels and put back on writing: alpha,
greyness, ICC profile, EXIF (orientation is applied to the pixels; thumbnail and maker notes are left out, they would no
longer be true). What is reduced is said in `Picture.notes`: 16 bits per channel become 8, an animation its first frame.
"""

import os
import secrets
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from stablesr_kit.errors import ImageError, OutputError

MAX_PIXELS = 100_000_000

READ_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
READ_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

# TIFF stays uncompressed: the compressing encoder cannot hold EXIF directories.
_WRITE_OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".webp": ("WEBP", {"quality": 95}),
}

_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")

# What a photo says about itself; everything else in the first EXIF directory describes how the file was stored.
_KEPT_EXIF = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
# Sizes and offsets that the result makes untrue.
_DROPPED_EXIF = (
    ExifTags.Base.MakerNote,
    ExifTags.Base.ExifImageWidth,
    ExifTags.Base.ExifImageHeight,
    ExifTags.Base.ExifInteroperabilityOffset,
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture read from a file: upright 8-bit RGB, and what is put back when the result is written."""

    rgb: Image.Image
    """Mode RGB, orientation applied."""
    alpha: Image.Image | None = None
    """Mode L, the size of `rgb`; None if the file has no transparency."""
    is_grey: bool = False
    """True if the file is grey: so is the result."""
    icc_profile: bytes | None = None
    """Colour profile of the pixels; None stands for sRGB."""
    exif: bytes | None = None
    """What the photo says about itself, without orientation, sizes, thumbnail and maker notes."""
    notes: tuple[str, ...] = ()
    """What was reduced on reading, one phrase each; for the user to see."""


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a file of one of `READ_FORMATS`, of at most `max_pixels` pixels (never above Pillow's own limit).

    Raises ImageError if there is no such file, or it is not a picture, truncated, empty, or too large.
    """
    if not path.exists():
        raise ImageError(f"{path}: no such file or folder; check the name")
    if not path.is_file():
        raise ImageError(f"{path}: a folder or device, not a picture; give a picture file")
    # A broken file can make Pillow warn about its metadata; the user gets our one line instead.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=READ_FORMATS) as image:
                _check_size(image.size, max_pixels)
                # Pillow reduces 16-bit colour on loading; until then the decoder's raw mode ("RGB;16B") tells.
                is_deep = _is_deep_grey(image) or any(";16" in str(tile[3]) for tile in image.tile)
                image.load()
                return as_picture(image, is_deep)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        except PermissionError as error:
            raise ImageError(f"{path}: may not be read; change its permissions") from error
        except UnidentifiedImageError as error:
            given = "an empty file" if path.stat().st_size == 0 else "not a picture, or truncated or damaged"
            raise ImageError(f"{path}: {given}; give one of {', '.join(READ_FORMATS)}") from error
        except Image.DecompressionBombError as error:
            exceeded, _, _ = str(error).partition(",")
            raise ImageError(f"{path}: {exceeded}; scale or crop it first") from error
        # Decoders meet broken files with OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
        except Exception as error:
            raise ImageError(f"{path}: truncated or damaged ({error}); get a whole copy of it") from error


def as_picture(image: Image.Image, is_deep: bool = False) -> Picture:
    """The picture in a Pillow image of any mode, as if it were read from a file.

    is_deep: the file it came from had more than 8 bits per channel, which `notes` then says.

    Raises ImageError if the colour mode is not supported, or grey values are out of range.
    """
    if not (image.mode in _COLOUR_MODES or is_grey_mode(image)):
        raise ImageError(f"colour mode {image.mode} is not supported; convert it to RGB first")
    notes = []
    # The second picture in a phone's JPEG (MPO) is a depth or gain map, not a frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append("only its first frame or page is used")
    if is_deep:
        notes.append("more than 8 bits per channel are reduced to 8")
    profile: bytes | None = image.info.get("icc_profile")
    try:
        exif = descriptive_exif(image)
        image = ImageOps.exif_transpose(image)
    except Exception:  # EXIF is free-form bytes: any parser error means it is not readable
        exif = None
        notes.append("EXIF cannot be read and is left out")
    is_grey = is_grey_mode(image)
    if image.mode == "CMYK":
        rgb, alpha, profile = cmyk_to_srgb(image, profile), None, None
    else:
        image = _eight_bit(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        rgb = image.convert("RGB")
    return Picture(
        rgb=rgb,
        alpha=alpha,
        is_grey=is_grey,
        icc_profile=profile if profile and is_profile_of(profile, b"GRAY" if is_grey else b"RGB ") else None,
        exif=exif,
        notes=tuple(notes),
    )


def write_picture(path: Path, restored: Image.Image, source: Picture, scratch: Path | None = None) -> None:
    """Write a restored RGB picture with the alpha, greyness, profile and EXIF of its source; the suffix is the format.

    The file appears whole or not at all; an older one of that name is replaced. scratch: as in `replacing`.

    Raises OutputError.
    """
    check_output(path, source)
    format_name, options = _WRITE_OPTIONS[path.suffix.lower()]
    image = restored.convert("L" if source.is_grey else "RGB")
    if source.alpha is not None:
        image.putalpha(source.alpha.resize(image.size, Image.Resampling.BICUBIC))
    metadata = {"icc_profile": source.icc_profile, "exif": source.exif}
    encoded = BytesIO()
    try:
        image.save(encoded, format_name, **options, **{k: v for k, v in metadata.items() if v is not None})
    except (OSError, ValueError) as error:
        given = f"{image.width}x{image.height} pixels cannot be written as {format_name}"
        raise OutputError(f"{path}: {given} ({error}); choose .png or .tif") from error
    with replacing(path, scratch) as part:
        part.write_bytes(encoded.getbuffer())


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A new name to write to, which becomes `path` at the end: the old file or the new one is there, never a part.

    scratch: folder of the new name, on the same disk; None is beside `path`. Raises OutputError for an OSError inside.
    """
    part = (scratch or path.parent) / f".{secrets.token_hex(8)}.part"
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def check_output(path: Path, source: Picture | None = None) -> None:
    """Raise OutputError if the suffix names no format we write, or one that cannot hold the source's transparency."""
    if path.suffix.lower() not in _WRITE_OPTIONS:
        given = f"suffix {path.suffix!r} is not supported" if path.suffix else "no suffix"
        raise OutputError(f"{path}: {given}; use one of {', '.join(_WRITE_OPTIONS)}")
    if source is not None and source.alpha is not None and _WRITE_OPTIONS[path.suffix.lower()][0] == "JPEG":
        raise OutputError(f"{path}: JPEG cannot hold the transparency of this picture; use .png, .webp or .tif")


def list_images(inputs: Iterable[Path]) -> list[Path]:
    """The files given, and the pictures directly in the folders given, sorted by name; each path once.

    In folders, hidden files and files without a picture's suffix are skipped. Files are returned as given: whether they
    are pictures shows when they are read. Raises ImageError for what does not exist and for a folder without a picture.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        if not given.exists():
            raise ImageError(f"{given}: no such file or folder; check the name")
        if not given.is_dir():
            found[given] = None
            continue
        try:
            pictures = sorted(path for path in given.iterdir() if _looks_like_picture(path))
        except OSError as error:
            raise ImageError(f"{given}: the folder cannot be listed ({error.strerror})") from error
        if not pictures:
            raise ImageError(f"{given}: no picture in this folder; expected {', '.join(sorted(READ_SUFFIXES))}")
        found.update(dict.fromkeys(pictures))
    return list(found)


def side_by_side(source: Picture, restored: Image.Image) -> Image.Image:
    """The source, enlarged bicubically to the size of the result, left of the result; RGB, without alpha."""
    enlarged = source.rgb.resize(restored.size, Image.Resampling.BICUBIC)
    gap = max(restored.width // 100, 1)
    pair = Image.new("RGB", (2 * restored.width + gap, restored.height), "white")
    pair.paste(enlarged, (0, 0))
    pair.paste(restored.convert("L").convert("RGB") if source.is_grey else restored, (restored.width + gap, 0))
    return pair


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{width}x{height} pixels; a picture has at least one")
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height / 1e6:.0f} million pixels, "
            f"more than the limit of {max_pixels / 1e6:g}; scale or crop it first"
        )


def is_grey_mode(image: Image.Image) -> bool:
    """True if the picture has one colour channel of any depth."""
    return image.mode in ("1", "L", "LA") or _is_deep_grey(image)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode L, rounded; other modes as they are."""
    if not _is_deep_grey(image):
        return image
    values = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise ImageError(
            f"grey values from {values.min():g} to {values.max():g} in mode {image.mode}; "
            f"expected 0 to {white:g}: convert it to 8 or 16 bits first"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def cmyk_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of a CMYK image by the picture's own ink profile; without one that can be used, by Pillow's plain formula."""
    if profile and is_profile_of(profile, b"CMYK"):
        try:
            inks = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted if converted is not None else image.convert("RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def is_profile_of(profile: bytes, colour_space: bytes) -> bool:
    """True if the header of the ICC profile names this colour space (four bytes at offset 16)."""
    return profile[16:20] == colour_space


def descriptive_exif(image: Image.Image) -> bytes | None:
    """What `Picture.exif` holds of an image's EXIF; None if that is nothing."""
    given = image.getexif()
    kept = Image.Exif()
    for tag in _KEPT_EXIF:
        if tag in given:
            kept[tag] = given[tag]
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        entries = {tag: value for tag, value in given.get_ifd(directory).items() if tag not in _DROPPED_EXIF}
        if entries:
            kept[directory] = entries
    return kept.tobytes() if len(kept) else None


def _looks_like_picture(path: Path) -> bool:
    return path.suffix.lower() in READ_SUFFIXES and not path.name.startswith(".") and path.is_file()
