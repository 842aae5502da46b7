"""What a file says of its picture is in the result's file, in any format that can hold it; the rest is named."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.imaging.reading import as_picture, read_picture
from stablesr_kit.imaging.writing import left_out, write_picture
from tests.helpers.picture_files import SRGB, as_pillow, noise, png_chunk, write_png

tifffile = pytest.importorskip("tifffile")

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"'
    b' tiff:Orientation="6" tiff:ImageWidth="29" dc:title="Caf\xc3\xa9"/></rdf:RDF></x:xmpmeta>'
)
TARGETS = ("out.png", "out.jpg", "out.tif", "out.webp")


def photo_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.Copyright] = "© Jürgen".encode()
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2001:02:03 04:05:06",
        ExifTags.Base.ExifImageWidth: 17,
        ExifTags.Base.MakerNote: b"offsets inside",
        ExifTags.Base.UserComment: b"ASCII\0\0\0parameters",
    }
    exif[ExifTags.IFD.GPSInfo] = {
        ExifTags.GPS.GPSLatitudeRef: "N",
        ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.5),
        ExifTags.GPS.GPSDateStamp: "2001:02:03",
    }
    return exif


def described_file(folder: Path, name: str) -> Path:
    """A picture with all that a format holds, as Pillow and tifffile write it."""
    path, image = folder / name, as_pillow(noise())
    if name == "in.png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", "a cat, Steps: 20, Seed: 1")
        info.add_itxt("Titel", "Käse 猫")
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        image.save(path, exif=photo_exif(), pnginfo=info, dpi=(300, 300), icc_profile=SRGB)
    elif name == "in.jpg":
        iptc = b"\x1c\x02\x78\0\x07caption"
        resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc
        segment = b"\xff\xed" + (len(resource) + 2).to_bytes(2, "big") + resource
        buffer = BytesIO()
        image.save(
            buffer, "JPEG", exif=photo_exif(), xmp=XMP, dpi=(300, 300), icc_profile=SRGB, comment="ein Gruß".encode()
        )
        path.write_bytes(buffer.getvalue()[:2] + segment + buffer.getvalue()[2:])
    elif name == "in.tif":
        exif = photo_exif()
        exif[700] = XMP
        image.save(path, exif=exif.tobytes(), dpi=(300, 300), icc_profile=SRGB)
    else:
        image.save(path, exif=photo_exif(), xmp=XMP, icc_profile=SRGB)
    return path


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["in.png", "in.jpg", "in.tif", "in.webp"])
def test_metadata_travels_between_all_formats(source: str, target: str, tmp_path: Path) -> None:
    picture = read_picture(described_file(tmp_path, source))
    assert picture.notes == ()
    write_picture(tmp_path / target, picture.rgb, picture)
    with Image.open(tmp_path / target) as result:
        result.load()
        assert result.info["icc_profile"] == SRGB
        exif = result.getexif()
        assert exif[ExifTags.Base.Make] == "Camera"
        if source != "in.tif":  # Pillow's own writer has no accents there
            assert exif[ExifTags.Base.Copyright].encode("latin-1").decode() == "© Jürgen"
        details = exif.get_ifd(ExifTags.IFD.Exif)
        assert details[ExifTags.Base.DateTimeOriginal] == "2001:02:03 04:05:06"
        assert bytes(details[ExifTags.Base.UserComment]) == b"ASCII\0\0\0parameters"
        assert ExifTags.Base.MakerNote not in details
        assert ExifTags.Base.ExifImageWidth not in details
        place = exif.get_ifd(ExifTags.IFD.GPSInfo)
        assert place[ExifTags.GPS.GPSLatitude] == (1.0, 2.0, 3.5)
        assert place[ExifTags.GPS.GPSDateStamp] == "2001:02:03"
        xmp = result.info["xmp"]
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        assert b'dc:title="Caf\xc3\xa9"' in xmp
        assert b'tiff:Orientation="1"' in xmp
        assert b"ImageWidth" not in xmp
        if source != "in.webp":
            dpi = result.info.get("dpi") or [
                exif[tag] for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution)
            ]
            assert [round(float(number), 2) for number in dpi] == [300, 300]
        if source == "in.jpg" and target in ("out.jpg", "out.tif"):
            assert read_picture(tmp_path / target).metadata.iptc == b"\x1c\x02\x78\0\x07caption"
        if source == "in.jpg" and target == "out.tif":
            with tifffile.TiffFile(tmp_path / target) as tags:
                assert tags.pages[0].tags[33723].value == b"\x1c\x02\x78\0\x07caption"
    if target == "out.png":
        text = PngImagePlugin.PngImageFile(tmp_path / target).text
        if source == "in.png":
            assert (text["parameters"], text["Titel"]) == ("a cat, Steps: 20, Seed: 1", "Käse 猫")
        if source == "in.jpg":
            assert text["Comment"] == "ein Gruß"
    if (source, target) == ("in.jpg", "out.jpg"):
        assert Image.open(tmp_path / target).info["comment"].decode() == "ein Gruß"


@pytest.mark.parametrize(
    ("source", "target", "lost"),
    [
        ("in.png", "out.png", []),
        ("in.png", "out.jpg", ["text"]),
        ("in.jpg", "out.jpg", []),
        ("in.jpg", "out.png", ["IPTC"]),
        ("in.jpg", "out.webp", ["IPTC", "the comment"]),
        ("in.tif", "out.webp", []),
    ],
)
def test_what_a_format_cannot_hold_is_named(source: str, target: str, lost: list[str], tmp_path: Path) -> None:
    assert left_out(tmp_path / target, read_picture(described_file(tmp_path, source))) == lost


def test_blocks_too_long_for_jpeg_are_named_and_left_out(tmp_path: Path) -> None:
    plain = as_picture(as_pillow(noise()))
    source = replace(plain, metadata=replace(plain.metadata, xmp=b"x" * 70_000, exif=bytes(70_000)))
    assert left_out(tmp_path / "out.jpg", source) == ["EXIF (too long)", "XMP (too long)"]
    write_picture(tmp_path / "out.jpg", plain.rgb, source)
    assert read_picture(tmp_path / "out.jpg").metadata == plain.metadata


@pytest.mark.parametrize("target", TARGETS)
def test_no_resolution_is_invented(target: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "in.tif", noise(), photometric="rgb", resolutionunit="none", metadata=None)
    source = read_picture(tmp_path / "in.tif")
    assert source.metadata.dpi is None
    write_picture(tmp_path / target, source.rgb, source)
    with Image.open(tmp_path / target) as stored:
        # Pillow itself gives JPEG files with EXIF and TIFF files that say nothing a resolution.
        assert stored.info.get("jfif_unit", 0) == 0
        assert target == "out.tif" or "dpi" not in stored.info or stored.info["dpi"] == (72, 72)
        assert ExifTags.Base.XResolution not in stored.getexif()
    assert read_picture(tmp_path / target).metadata.dpi is None


def test_resolutions_of_every_unit_are_read(tmp_path: Path) -> None:
    for unit, number in ((2, 600), (3, 600 / 2.54)):
        tifffile.imwrite(
            tmp_path / "in.tif", noise(), photometric="rgb", resolution=(number, number), resolutionunit=unit
        )
        assert read_picture(tmp_path / "in.tif").metadata.dpi == (600, 600)
    as_pillow(noise()).save(tmp_path / "in.jpg", dpi=(72, 96))
    assert read_picture(tmp_path / "in.jpg").metadata.dpi == (72, 96)


def test_text_after_the_pixels_is_read_too(tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", noise(), after=png_chunk(b"tEXt", b"Author\0A. Painter"))
    assert read_picture(tmp_path / "in.png").metadata.text == (("Author", "A. Painter"),)


@pytest.mark.parametrize("target", TARGETS)
def test_provenance_is_written_and_read_again_and_replaces_an_older_one(target: str, tmp_path: Path) -> None:
    given = {"model": 'mini "<&>"', "seed": 2**64 - 1, "w": 0.5, "prompt": None, "ort": "Köln"}
    picture = read_picture(described_file(tmp_path, "in.jpg"))
    write_picture(tmp_path / target, picture.rgb, picture, provenance=given)
    assert read_provenance(tmp_path / target) == given
    again = read_picture(tmp_path / target)
    write_picture(tmp_path / target, again.rgb, again, provenance={"w": 1})
    assert read_provenance(tmp_path / target) == {"w": 1}
    assert (tmp_path / target).read_bytes().count(b"stablesr") == (1 if target == "out.png" else 3)
    write_picture(tmp_path / target, again.rgb, again)
    assert read_provenance(tmp_path / target) is None
    assert b"stablesr" not in (tmp_path / target).read_bytes()
    with Image.open(tmp_path / target) as stored:
        stored.load()
        assert b"Caf\xc3\xa9" in (
            stored.info["xmp"] if isinstance(stored.info["xmp"], bytes) else stored.info["xmp"].encode()
        )


def test_a_file_of_somebody_else_has_no_provenance(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    as_pillow(noise()).save(tmp_path / "plain.png")
    for name in ("text.png", "plain.png", "missing.png"):
        assert read_provenance(tmp_path / name) is None


def test_metadata_that_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    as_pillow(noise()).save(tmp_path / "in.jpg", exif=b"Exif\0\0no directory at all")
    picture = read_picture(tmp_path / "in.jpg")
    assert picture.notes == ("EXIF cannot be read and is left out",)
    assert np.array_equal(picture.pixels, np.asarray(Image.open(tmp_path / "in.jpg")))
