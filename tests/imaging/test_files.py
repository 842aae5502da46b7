"""Picture files: everything a user may have comes in, everything broken is one line, results are whole or absent."""

import os
import resource
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from stablesr_kit.errors import ImageError, OutputError
from stablesr_kit.imaging.files import (
    Picture,
    check_output,
    list_images,
    read_picture,
    side_by_side,
    write_picture,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gradient(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray:
    values = np.arange(height * width * channels).reshape(height, width, channels) * 7 % 256
    return values.astype(np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def restore_by_enlarging(picture: Picture) -> Image.Image:
    return picture.rgb.resize((picture.rgb.width * 4, picture.rgb.height * 4), Image.Resampling.BICUBIC)


def read_and_write(source: Path, target: Path) -> tuple[Picture, Image.Image]:
    picture = read_picture(source)
    write_picture(target, restore_by_enlarging(picture), picture)
    result = Image.open(target)
    result.load()
    return picture, result


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_is_read_as_rgb_and_comes_back_in_its_kind(mode: str, tmp_path: Path) -> None:
    rgb = Image.fromarray(gradient())
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(rgb.convert("L"))
        levels = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 257}
        image = Image.fromarray(levels.get(mode, grey.astype(np.float32) / 255))
    else:
        image = rgb.convert(mode) if mode != "PA" else rgb.convert("P").convert("PA")
    path = tmp_path / ("picture.tif" if mode not in ("P", "PA") else "picture.png")
    (image if mode != "PA" else image.convert("RGBA")).save(path)

    picture, result = read_and_write(path, tmp_path / "result.png")

    assert picture.rgb.mode == "RGB"
    assert picture.rgb.size == (17, 12)
    assert result.size == (68, 48)
    grey_modes = {"1": "L", "L": "L", "LA": "LA", "I;16": "L", "I": "L", "F": "L"}
    assert result.mode == grey_modes.get(mode, "RGBA" if mode in ("RGBA", "PA") else "RGB")
    if mode in ("I;16", "I", "F"):
        assert np.array_equal(np.asarray(picture.rgb)[..., 0], grey)
        assert picture.notes == ("more than 8 bits per channel are reduced to 8",)
    if mode == "RGB":
        assert np.array_equal(np.asarray(picture.rgb), gradient())
        assert picture.notes == ()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_png_is_reduced_to_8_and_says_so(colour_type: int, channels: int, tmp_path: Path) -> None:
    row = b"\0" + (np.arange(8 * channels) * 2000).astype(">u2").tobytes()
    (tmp_path / "deep.png").write_bytes(png_bytes(8, 8, 16, colour_type, row * 8))
    picture = read_picture(tmp_path / "deep.png")
    assert picture.notes == ("more than 8 bits per channel are reduced to 8",)
    assert (picture.alpha is not None) == (channels in (2, 4))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_kept_and_enlarged(suffix: str, tmp_path: Path) -> None:
    pixels = gradient(channels=4)
    pixels[..., 3] = np.where(np.arange(17) < 8, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    picture, result = read_and_write(tmp_path / "cut.png", tmp_path / f"out{suffix}")
    assert result.mode == "RGBA"
    alpha = np.asarray(result)[..., 3]
    assert alpha[:, :24].max() < 16
    assert alpha[:, 40:].min() > 239
    assert picture.alpha is not None
    with pytest.raises(OutputError, match=r"out\.jpg: JPEG cannot hold the transparency"):
        write_picture(tmp_path / "out.jpg", restore_by_enlarging(picture), picture)
    assert not (tmp_path / "out.jpg").exists()


def test_palette_transparency_becomes_alpha(tmp_path: Path) -> None:
    image = Image.fromarray(gradient()).convert("P")
    image.save(tmp_path / "palette.png", transparency=3)
    assert read_picture(tmp_path / "palette.png").alpha is not None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_reset(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as stored:
        upright = ImageOps.exif_transpose(stored)
    picture, result = read_and_write(tmp_path / "turned.png", tmp_path / "out.png")
    assert np.array_equal(np.asarray(picture.rgb), np.asarray(upright))
    assert result.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert result.getexif()[ExifTags.Base.Make] == "Camera"


@pytest.mark.parametrize("target", ["out.png", "out.jpg", "out.webp", "out.tif", "out.JPEG"])
@pytest.mark.parametrize("source", ["in.jpg", "in.png", "in.tif", "in.webp"])
def test_profile_and_exif_travel_between_all_formats(source: str, target: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.Copyright] = "Somebody"
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2001:02:03 04:05:06",
        ExifTags.Base.ExifImageWidth: 17,
        ExifTags.Base.MakerNote: b"offsets inside",
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.5)}
    Image.fromarray(gradient()).save(tmp_path / source, exif=exif.tobytes(), icc_profile=SRGB)
    picture, result = read_and_write(tmp_path / source, tmp_path / target)
    assert picture.notes == ()
    assert result.info["icc_profile"] == SRGB
    written = result.getexif()
    assert written[ExifTags.Base.Make] == "Camera"
    assert written[ExifTags.Base.Copyright] == "Somebody"
    details = written.get_ifd(ExifTags.IFD.Exif)
    assert details[ExifTags.Base.DateTimeOriginal] == "2001:02:03 04:05:06"
    assert ExifTags.Base.MakerNote not in details
    assert ExifTags.Base.ExifImageWidth not in details
    assert written.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (1.0, 2.0, 3.5)


def test_unreadable_exif_is_left_out_with_a_note(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "in.jpg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\0\0")
    picture = read_picture(tmp_path / "in.jpg")
    assert picture.exif is None


def test_a_profile_of_another_colour_space_is_not_kept(tmp_path: Path) -> None:
    Image.fromarray(gradient()).convert("L").save(tmp_path / "grey.png", icc_profile=SRGB)
    Image.fromarray(gradient()).convert("CMYK").save(
        tmp_path / "ink.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108
    )
    assert read_picture(tmp_path / "grey.png").icc_profile is None
    assert read_picture(tmp_path / "ink.jpg").icc_profile is None


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path) -> None:
    frames = [Image.fromarray(gradient()).convert("P"), Image.new("P", (17, 12))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / "moving.gif")
    assert picture.notes == ("only its first frame or page is used",)
    assert np.asarray(picture.rgb).std() > 0


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """One file for each way to be wrong, and what the message must say."""
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    Image.open(whole).save(folder / "whole.jpg")
    Image.open(whole).save(folder / "whole.tif", compression="tiff_lzw")
    Image.open(whole).save(folder / "whole.webp", lossless=True)
    contents = {
        "empty.png": (b"", "an empty file"),
        "text.jpg": (b"not a picture at all", "not a picture"),
        "cut.png": (whole.read_bytes()[:-4000], "truncated or damaged"),
        "cut.jpg": ((folder / "whole.jpg").read_bytes()[:-1000], "truncated or damaged"),
        "cut.tif": ((folder / "whole.tif").read_bytes()[:4000], "truncated|not a picture"),
        "cut.webp": ((folder / "whole.webp").read_bytes()[:-4000], "truncated|not a picture"),
        "zero.png": (png_bytes(0, 8, 8, 2, b""), "not a picture"),
        "bomb.png": (png_bytes(30000, 30000, 8, 2, b""), "Image size .900000000 pixels. exceeds limit"),
        "large.png": (
            png_bytes(11000, 11000, 8, 2, b""),
            "11000x11000 is 121 million pixels, more than the limit of 100",
        ),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
        "noisy.png": (whole.read_bytes()[:60] + b"\xff" * 300 + whole.read_bytes()[360:], "truncated or damaged"),
    }
    cases = {}
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        cases[name] = (folder / name, message)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tif")
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(folder / "negative.tif")
    Image.fromarray(gradient()).convert("LAB").save(folder / "lab.tif")
    return cases | {
        "nan.tif": (folder / "nan.tif", "grey values from nan"),
        "negative.tif": (folder / "negative.tif", "grey values from -5"),
        "lab.tif": (folder / "lab.tif", "colour mode LAB is not supported"),
        "missing.png": (folder / "missing.png", "no such file"),
        "folder": (folder, "a folder or device"),
        "device": (Path(os.devnull), "a folder or device"),
    }


def test_broken_files_are_one_line_each_without_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (path, message) in broken_files(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match=message) as caught:
                read_picture(path)
        assert str(caught.value).startswith(f"{path}: "), name
        assert "\n" not in str(caught.value), name
    assert capfd.readouterr().err == ""


def test_the_pixel_limit_is_an_argument(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "in.png")
    assert read_picture(tmp_path / "in.png", max_pixels=12 * 17).rgb.size == (17, 12)
    with pytest.raises(ImageError, match="17x12 is"):
        read_picture(tmp_path / "in.png", max_pixels=12 * 17 - 1)


def test_a_result_replaces_an_older_one_with_ordinary_permissions(tmp_path: Path) -> None:
    picture = Picture(rgb=Image.fromarray(gradient()))
    (tmp_path / "out.png").write_text("older")
    write_picture(tmp_path / "out.png", picture.rgb, picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), gradient())
    (tmp_path / "probe").touch()
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "probe"]


def test_a_disk_that_fills_up_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    picture = Picture(rgb=Image.fromarray(noise))
    (tmp_path / "out.png").write_text("older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"out\.png: cannot be written \(.+\)") as caught:
            write_picture(tmp_path / "out.png", picture.rgb, picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out.png").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    picture = Picture(rgb=Image.fromarray(gradient()))
    with pytest.raises(KeyboardInterrupt):
        write_picture(tmp_path / "out.png", picture.rgb, picture)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    picture = Picture(rgb=Image.fromarray(gradient()))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "file" / "out.png", tmp_path / "missing" / "out.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write_picture(target, picture.rgb, picture)
        assert str(caught.value).startswith(f"{target}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(OutputError, match="Permission denied"):
            write_picture(tmp_path / "out.png", Image.fromarray(gradient()), Picture(rgb=Image.fromarray(gradient())))
    finally:
        tmp_path.chmod(0o700)


def test_unknown_suffixes_name_the_known_ones(tmp_path: Path) -> None:
    for name, given in (("out.bmp", "suffix '.bmp' is not supported"), ("out", "no suffix")):
        with pytest.raises(OutputError, match=given + r"; use one of \.png, \.jpg"):
            check_output(tmp_path / name)


def test_a_picture_too_long_for_its_format_says_which_can_hold_it(tmp_path: Path) -> None:
    picture = Picture(rgb=Image.new("RGB", (17000, 1)))
    with pytest.raises(OutputError, match=r"17000x1 pixels cannot be written as WEBP .*choose \.png or \.tif"):
        write_picture(tmp_path / "out.webp", picture.rgb, picture)


def test_folders_are_listed_sorted_without_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "c.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "inner.png").mkdir()
    (tmp_path / "empty").mkdir()
    assert [path.name for path in list_images([tmp_path])] == ["a.JPG", "b.png", "c.tiff"]
    again = list_images([tmp_path / "b.png", tmp_path, tmp_path / "notes.txt"])
    assert [path.name for path in again] == ["b.png", "a.JPG", "c.tiff", "notes.txt"]
    with pytest.raises(ImageError, match="no picture in this folder"):
        list_images([tmp_path / "empty"])


def test_side_by_side_shows_the_enlarged_source_and_the_result() -> None:
    picture = Picture(rgb=Image.new("RGB", (10, 5), "red"))
    pair = side_by_side(picture, Image.new("RGB", (40, 20), "blue"))
    assert pair.size == (81, 20)
    assert pair.getpixel((5, 5)) == (255, 0, 0)
    assert pair.getpixel((40, 5)) == (255, 255, 255)
    assert pair.getpixel((60, 5)) == (0, 0, 255)
