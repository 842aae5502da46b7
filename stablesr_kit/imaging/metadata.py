"""Metadata of pictures: reading them from every format, and writing them into results.

The following is carried over: the colour profile, EXIF (camera, date, place, author; but not orientation, sizes,
thumbnail and maker notes, which do not fit the result), XMP, IPTC, text of PNG files, the comment, and the resolution
in pixels per inch, which stays the same, so that a four times larger picture prints four times larger.

Pillow parses and writes the contents. The blocks are inserted into files that libvips has encoded, since libvips itself
does not preserve them (texts lose their accents, a resolution is invented, TIFF has no EXIF).

Colour profiles are at the end: matching them to pixels, making them from gamma and chromaticities, conversion to sRGB.
"""

import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    TiffTags,
    WebPImagePlugin,
)

from stablesr_kit.imaging.finding import START, format_of

PROVENANCE = "stablesr"
"""Key of the text, and prefix of the XMP property, that says how a result was made."""
_NAMESPACE = "https://stablesr-kit/ns/1.0/"

_HEADERS: dict[str, Any] = {
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_MARKER = b"http://ns.adobe.com/xap/1.0/\0"
_IPTC_RESOURCE = 0x0404
_SEGMENT = 2**16 - 3  # what a segment of a JPEG file holds at most
_EMPTY_EXIF = 20  # bytes, with the mark and a directory of no entries
_LARGEST_BLOCK = 2**24  # of a PNG file: what is larger is no description of a picture

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
_INNER_DIRECTORIES: tuple[int, ...] = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_TIFF_XMP, _TIFF_IPTC, _TIFF_PROFILE = 700, 33723, 34675
_PER_INCH, _PER_CENTIMETRE = 2, 3


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata that is carried over from a picture's file to its result."""

    icc_profile: bytes | None = None
    """Profile of the pixels; None is sRGB."""
    exif: bytes | None = None
    """As a TIFF block."""
    xmp: bytes | None = None
    iptc: bytes | None = None
    text: tuple[tuple[str, str], ...] = ()
    """Keys and texts, as PNG files have them; generation parameters are among them."""
    comment: str | None = None
    dpi: tuple[float, float] | None = None
    """Pixels per inch across and down."""

    def with_provenance(self, provenance: Mapping[str, Any] | None, path: Path) -> "Metadata":
        """The same with a line of JSON on how the result was made: text in PNG files, XMP in others; None: no line.

        The line of an earlier restoration is removed.
        """
        text = tuple(pair for pair in self.text if pair[0] != PROVENANCE)
        xmp = None if self.xmp is None else _XMP_PROVENANCE.sub(b"", self.xmp)
        if provenance is None:
            return replace(self, text=text, xmp=xmp)
        line = json.dumps(provenance)
        if path.suffix.lower() == ".png":
            return replace(self, text=(*text, (PROVENANCE, line)), xmp=xmp)
        return replace(self, text=text, xmp=_with_property(xmp, line))


@dataclass(frozen=True)
class Described:
    """The metadata of a file, and what else reading has found."""

    metadata: Metadata
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 is upright."""
    tags: Mapping[int, Any] | None = None
    """Of a TIFF file's first directory."""
    notes: tuple[str, ...] = ()


def read_metadata(file: IO[bytes], kind: str, is_grey: bool) -> Described:
    """Metadata of a file of a kind (PNG, JPEG, TIFF ...); unreadable metadata gives a note instead."""
    try:
        if kind == "TIFF":
            return _of_tiff(file)
        if kind not in _HEADERS:
            return Described(Metadata())
        with _HEADERS[kind](_without_pixels(file) if kind == "PNG" else file) as header:
            return describe(header, is_grey)
    except Exception:  # free-form bytes: any parser error means they cannot be read
        return Described(Metadata(), notes=("its metadata cannot be read and is left out",))


def describe(image: Image.Image, is_grey: bool) -> Described:
    """Metadata in a Pillow image, without decoding pixels. Raises what Pillow's parsers raise."""
    info, notes = image.info, []
    try:
        exif = Image.Image.getexif(image)  # a PNG's own decodes the pixels
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        # Pillow reports 72 for JPEG files without a resolution.
        is_said = "dpi" in info and (not isinstance(image, JpegImagePlugin.JpegImageFile) or info.get("jfif_unit"))
        dpi = _checked_dpi(info["dpi"]) if is_said else _tiff_dpi(exif)
        kept = descriptive_exif(exif)
        if len(info.get("exif") or b"") > _EMPTY_EXIF and not len(exif):
            raise ValueError("no directory")
    except Exception:
        kept, orientation, dpi = None, 1, _checked_dpi(info.get("dpi"))
        notes.append("EXIF cannot be read and is left out")
    profile = info.get("icc_profile") or None
    if profile is None and not info.get("srgb") and ("gamma" in info or "chromaticity" in info):
        try:
            profile = profile_from(info.get("gamma"), info.get("chromaticity"), is_grey)
        except ValueError:
            notes.append("its gamma and chromaticities describe no colours and are left out")
    stream = getattr(image, "png", None)  # of a PNG whose pixels are not decoded, which asking for its text would do
    texts = dict(stream.im_text if stream is not None else getattr(image, "text", {}))
    texts.pop("XML:com.adobe.xmp", None)
    resources = info.get("photoshop")
    return Described(
        Metadata(
            icc_profile=profile,
            exif=kept,
            xmp=_truthful(info.get("xmp")),
            iptc=resources.get(_IPTC_RESOURCE) if isinstance(resources, dict) else None,
            comment=_decoded(texts.pop("Comment", None) or info.get("comment")),
            text=tuple((str(key), str(value)) for key, value in texts.items()),
            dpi=dpi,
        ),
        orientation if orientation in range(1, 9) else 1,
        notes=tuple(notes),
    )


def descriptive_exif(given: Image.Exif) -> bytes | None:
    """The EXIF to carry over, as a TIFF block; None if there is none."""
    kept = Image.Exif()
    for tag in _KEPT_EXIF:
        if tag in given:
            value = given[tag]
            # Pillow reads strings as Latin-1 and writes ASCII; it keeps bytes unchanged.
            kept[tag] = value if not isinstance(value, str) or value.isascii() else value.encode("latin-1")
    for directory in _INNER_DIRECTORIES:
        entries = {tag: value for tag, value in given.get_ifd(directory).items() if tag not in _DROPPED_EXIF}
        if entries:
            kept[directory] = entries
    return kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) else None


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The provenance of a result; None if there is none, or the file cannot be read."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken file can make Pillow warn
            kind = format_of(file.read(START))
            file.seek(0)
            metadata = read_metadata(file, kind or "", False).metadata
    except OSError:
        return None
    lines = [text for key, text in metadata.text if key == PROVENANCE]
    if metadata.xmp is not None and (found := _XMP_PROVENANCE.search(metadata.xmp)):
        lines.append(_unquoted(found.group(1)))
    for line in lines:
        with suppress(ValueError):
            provenance = json.loads(line)
            if isinstance(provenance, dict):
                return provenance
    return None


def lost_in(kind: str, metadata: Metadata) -> list[str]:
    """Names of the metadata that a file of this kind cannot hold; empty if it holds everything."""
    exif, xmp, iptc = (len(block or b"") for block in (metadata.exif, metadata.xmp, metadata.iptc))
    has_no = {
        "text": metadata.text and kind != "PNG",
        "IPTC": iptc and kind in ("PNG", "WEBP"),
        "the comment": metadata.comment and (kind == "WEBP" or (kind == "TIFF" and _has_description(metadata.exif))),
    }
    if kind == "JPEG":
        has_no |= {"EXIF (too long)": exif > _SEGMENT - 6, "XMP (too long)": xmp > _SEGMENT - len(_XMP_MARKER)}
        has_no |= {"IPTC (too long)": iptc > _SEGMENT - 27}
        has_no |= {"the comment (too long)": len((metadata.comment or "").encode()) > _SEGMENT}
    return [what for what, is_lost in has_no.items() if is_lost]


def add_metadata(encoded: Path, target: Path, kind: str, metadata: Metadata) -> None:
    """Copy a file that libvips has encoded, with the metadata in it; the profile is there already.

    kind: PNG, JPEG, WEBP or TIFF. Raises OSError.
    """
    with encoded.open("rb") as source, target.open("wb+") as copy:
        _ADDING[kind](source, copy, metadata)


def _add_to_png(source: IO[bytes], copy: IO[bytes], metadata: Metadata) -> None:
    copy.write(source.read(len(_PNG_SIGNATURE) + 25))  # and IHDR
    texts = [*metadata.text, *([("Comment", metadata.comment)] if metadata.comment else [])]
    if metadata.dpi is not None:
        per_metre = (round(number / 0.0254) for number in metadata.dpi)
        copy.write(_png_chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if metadata.exif is not None:
        copy.write(_png_chunk(b"eXIf", metadata.exif))
    if metadata.xmp is not None:
        copy.write(_png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    for key, text in texts:
        name = key.encode("latin-1", "replace")[:79]
        try:
            copy.write(_png_chunk(b"tEXt", name + b"\0" + text.encode("latin-1")))
        except UnicodeEncodeError:
            copy.write(_png_chunk(b"iTXt", name + b"\0\0\0\0\0" + text.encode("utf-8", "replace")))
    for name, data in _png_chunks(source):
        if name == b"pHYs":
            continue
        if name == b"IDAT":
            copy.write(_png_chunk(name, data))
            break
        copy.write(_png_chunk(name, data))
    copyfileobj(source, copy)


def _add_to_jpeg(source: IO[bytes], copy: IO[bytes], metadata: Metadata) -> None:
    lost = lost_in("JPEG", metadata)
    across, down = (min(max(round(number), 1), 65535) for number in metadata.dpi or (1, 1))
    copy.write(source.read(2))
    copy.write(_segment(0xE0, b"JFIF\0\1\1" + struct.pack(">BHHBB", metadata.dpi is not None, across, down, 0, 0)))
    if metadata.exif is not None and "EXIF (too long)" not in lost:
        copy.write(_segment(0xE1, b"Exif\0\0" + metadata.exif))
    if metadata.xmp is not None and "XMP (too long)" not in lost:
        copy.write(_segment(0xE1, _XMP_MARKER + metadata.xmp))
    if metadata.iptc is not None and "IPTC (too long)" not in lost:
        padded = metadata.iptc + bytes(len(metadata.iptc) % 2)
        resource = b"8BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(metadata.iptc)) + padded
        copy.write(_segment(0xED, b"Photoshop 3.0\0" + resource))
    if metadata.comment is not None and "the comment (too long)" not in lost:
        copy.write(_segment(0xFE, metadata.comment.encode()))
    copyfileobj(source, copy)


def _add_to_webp(source: IO[bytes], copy: IO[bytes], metadata: Metadata) -> None:
    exif = _with_resolution(metadata)
    added = {b"EXIF": exif, b"XMP ": metadata.xmp}
    flags = (exif is not None) << 3 | (metadata.xmp is not None) << 2
    copy.write(source.read(12))
    start = source.read(30)
    if start[:4] == b"VP8X":
        copy.write(start[:8] + bytes([start[8] | flags]) + start[9:])
    else:
        if flags:
            copy.write(b"VP8X" + struct.pack("<I", 10) + bytes([flags]) + bytes(3) + _webp_size(start))
        copy.write(start)
    copyfileobj(source, copy)
    for name, data in added.items():
        if data is not None:
            copy.write(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2))
    size = copy.tell() - 8
    copy.seek(4)
    copy.write(struct.pack("<I", size))


def _webp_size(start: bytes) -> bytes:
    """Width and height, less one, of a file with a single chunk: lossy `VP8 ` or lossless `VP8L`."""
    if start[:4] == b"VP8L":
        (bits,) = struct.unpack("<I", start[9:13])
        width, height = bits & 0x3FFF, bits >> 14 & 0x3FFF
    else:
        width, height = (side % 2**14 - 1 for side in struct.unpack("<HH", start[14:18]))
    return width.to_bytes(3, "little") + height.to_bytes(3, "little")


def _add_to_tiff(source: IO[bytes], copy: IO[bytes], metadata: Metadata) -> None:
    """Write the first directory again at the end of the file; it points to the same tiles."""
    copyfileobj(source, copy)
    directory = _tiff_directory(copy)
    for resolution in (ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit):
        directory.pop(resolution, None)
    if metadata.comment is not None:  # unless EXIF has another description
        directory[ExifTags.Base.ImageDescription] = metadata.comment.encode()
    if metadata.exif is not None:
        given = Image.Exif()
        given.load(b"Exif\0\0" + metadata.exif)
        for tag, value in given.items():
            if tag not in _INNER_DIRECTORIES:
                directory[tag] = value if not isinstance(value, str) else value.encode("latin-1")
        for inner in _INNER_DIRECTORIES:
            if entries := given.get_ifd(inner):
                directory.tagtype[inner] = TiffTags.LONG
                directory[inner] = dict(entries)
    for tag, block in ((_TIFF_XMP, metadata.xmp), (_TIFF_IPTC, metadata.iptc)):
        if block is not None:
            directory.tagtype[tag] = TiffTags.BYTE if tag == _TIFF_XMP else TiffTags.UNDEFINED
            directory[tag] = block
    if metadata.dpi is not None:
        directory[ExifTags.Base.ResolutionUnit] = _PER_INCH
        directory[ExifTags.Base.XResolution], directory[ExifTags.Base.YResolution] = metadata.dpi
    copy.seek(0, 2)
    copy.write(bytes(copy.tell() % 2))
    end = copy.tell()
    copy.write(directory.tobytes(end))
    _, _, is_big = _tiff_start(copy)
    order = "<" if directory.prefix == b"II" else ">"
    copy.seek(8 if is_big else 4)
    copy.write(struct.pack(order + ("Q" if is_big else "I"), end))


_ADDING = {"PNG": _add_to_png, "JPEG": _add_to_jpeg, "WEBP": _add_to_webp, "TIFF": _add_to_tiff}


def _tiff_directory(file: IO[bytes]) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The first directory of a TIFF file, decoded."""
    directory, offset, _ = _tiff_start(file)
    file.seek(offset)
    directory.load(file)
    for tag in list(directory):  # only decoded tags are written again
        directory[tag]
    return directory


def _tiff_start(file: IO[bytes]) -> tuple[TiffImagePlugin.ImageFileDirectory_v2, int, bool]:
    """An empty directory of a TIFF file's kind, where the first one is, and whether the file is a BigTIFF."""
    file.seek(0)
    start = file.read(16)
    is_big = start[2:4] in (b"+\0", b"\0+")
    if is_big:  # Pillow looks for the mark where only little-endian files have it
        directory = TiffImagePlugin.ImageFileDirectory_v2(b"II+\0" + start[4:], prefix=start[:2])
    else:
        directory = TiffImagePlugin.ImageFileDirectory_v2(start[:8])
    return directory, directory.next, is_big


def _of_tiff(file: IO[bytes]) -> Described:
    directory, offset, is_big = _tiff_start(file)
    file.seek(offset)
    directory.load(file)
    notes = []
    try:
        exif = Image.Exif()
        exif.bigtiff, exif.endian = is_big, "<" if directory.prefix == b"II" else ">"
        exif.load_from_fp(file, offset)
        kept = descriptive_exif(exif)
    except Exception:
        kept = None
        if any(tag in directory for tag in _INNER_DIRECTORIES):
            notes.append("EXIF cannot be read and is left out")
    tags = {}
    for tag in list(directory):
        with suppress(Exception):  # a tag that cannot be decoded is none
            tags[tag] = directory[tag]
    orientation = tags.get(ExifTags.Base.Orientation, 1)
    return Described(
        Metadata(
            icc_profile=_bytes(tags.get(_TIFF_PROFILE)),
            exif=kept,
            xmp=_truthful(_bytes(tags.get(_TIFF_XMP))),
            iptc=_bytes(tags.get(_TIFF_IPTC)),
            dpi=_tiff_dpi(tags),
        ),
        orientation if orientation in range(1, 9) else 1,
        tags,
        tuple(notes),
    )


def _tiff_dpi(tags: Mapping[int, Any]) -> tuple[float, float] | None:
    unit = {_PER_INCH: 1.0, _PER_CENTIMETRE: 2.54}.get(tags.get(ExifTags.Base.ResolutionUnit, _PER_INCH))
    across, down = (tags.get(tag) for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution))
    if unit is None or across is None or down is None:
        return None
    return _checked_dpi((float(across) * unit, float(down) * unit))


def _checked_dpi(dpi: Any) -> tuple[float, float] | None:
    """The resolution if it is plausible; numbers that are nearly whole, because of a file's unit, are rounded."""
    try:
        across, down = (float(number) for number in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not (0 < across < 1e6 and 0 < down < 1e6):
        return None
    across, down = (round(number) if abs(number - round(number)) < 0.02 else number for number in (across, down))
    return across, down


def _has_description(exif: bytes | None) -> bool:
    given = Image.Exif()
    given.load(exif or b"")
    return ExifTags.Base.ImageDescription in given


def _with_resolution(metadata: Metadata) -> bytes | None:
    """EXIF that also says the resolution, for files that have no other place for it."""
    if metadata.dpi is None:
        return metadata.exif
    exif = Image.Exif()
    if metadata.exif is not None:
        exif.load(metadata.exif)
    kept = {tag: value if not isinstance(value, str) else value.encode("latin-1") for tag, value in exif.items()}
    written = Image.Exif()
    for tag, value in kept.items():
        written[tag] = exif.get_ifd(tag) if tag in _INNER_DIRECTORIES else value
    written[ExifTags.Base.XResolution], written[ExifTags.Base.YResolution] = metadata.dpi
    written[ExifTags.Base.ResolutionUnit] = _PER_INCH
    return written.tobytes().removeprefix(b"Exif\0\0")


def _bytes(value: Any) -> bytes | None:
    """Bytes of a tag; some programs write them as 32-bit numbers."""
    if isinstance(value, tuple) and value and all(isinstance(number, int) for number in value):
        return b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in value)
    return value if isinstance(value, bytes) and value else None


def _decoded(comment: Any) -> str | None:
    """A comment, which is bytes in most files, in UTF-8 or Latin-1."""
    if isinstance(comment, bytes):
        comment = comment.rstrip(b"\0")
        try:
            comment = comment.decode()
        except UnicodeDecodeError:
            comment = comment.decode("latin-1")
    return comment if isinstance(comment, str) and comment else None


_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|\s*>\s*))\d+""")
_XMP_SIZE = re.compile(
    rb"""\s(?:tiff:Image(?:Width|Length)|exif:Pixel[XY]Dimension)\s*=\s*(?:"\d*"|'\d*')"""
    rb"""|<(tiff:Image(?:Width|Length)|exif:Pixel[XY]Dimension)>\s*\d*\s*</\1>"""
)
_XMP_PROVENANCE = re.compile(
    rb"""<rdf:Description rdf:about="" xmlns:stablesr="[^"]*" stablesr:Restoration=("[^"]*"|'[^']*')/>"""
)
_XMP_END = re.compile(rb"</([\w.-]+:)?RDF\s*>")
_XMP_EMPTY = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def _truthful(xmp: Any) -> bytes | None:
    """XMP with upright orientation and without sizes, since the result has another size."""
    if not isinstance(xmp, bytes) or not xmp:
        return None
    return _XMP_SIZE.sub(b"", _XMP_ORIENTATION.sub(rb"\g<1>1", xmp))


def _with_property(xmp: bytes | None, line: str) -> bytes:
    """XMP with the line as a property; XMP without RDF is replaced."""
    if xmp is None or not _XMP_END.search(xmp):
        xmp = _XMP_EMPTY
    end = list(_XMP_END.finditer(xmp))[-1].start()
    added = f'<rdf:Description rdf:about="" xmlns:stablesr="{_NAMESPACE}" stablesr:Restoration={_quoted(line)}/>'
    return xmp[:end] + added.encode() + xmp[end:]


def _quoted(line: str) -> str:
    return '"' + line.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;") + '"'


def _unquoted(value: bytes) -> str:
    return value[1:-1].decode("utf-8", "replace").replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&")


def _without_pixels(file: IO[bytes]) -> IO[bytes]:
    """A PNG file without its pixels: Pillow's parser stops at the pixels, but metadata may follow them."""
    file.seek(0)
    copy = BytesIO()
    copy.write(file.read(len(_PNG_SIGNATURE)))
    for name, data in _png_chunks(file, skipped=b"IDAT"):
        if name not in (b"acTL", b"fcTL", b"fdAT", b"IEND"):
            copy.write(_png_chunk(name, data))
    copy.write(_png_chunk(b"IDAT", b"") + _png_chunk(b"IEND", b""))
    copy.seek(0)
    return copy


def _png_chunks(file: IO[bytes], skipped: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks from here to the end; those skipped or too large to describe are left out."""
    while len(header := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", header)
        if name == skipped or (size > _LARGEST_BLOCK and name != b"IDAT"):
            file.seek(size + 4, 1)
            continue
        data = file.read(size)
        if len(data) < size:
            return
        file.seek(4, 1)
        yield name, data


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


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
