"""Every picture is read right, whoever wrote it; what is not read is refused in one true line."""

import os
import struct
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from PIL import ExifTags, Image, ImageCms, ImageOps

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging import reading
from stablesr_kit.imaging.metadata import profile_from
from stablesr_kit.imaging.reading import as_picture, open_picture, read_picture
from tests.helpers.picture_files import (
    SRGB,
    as_pillow,
    as_rgb,
    ink_profile,
    noise,
    png_chunk,
    write_packed_tiff,
    write_png,
)

tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_every_depth_and_channels(channels: int, dtype: Any, tmp_path: Path) -> None:
    given = noise(channels=channels, dtype=dtype)
    write_png(tmp_path / "in", given)
    picture = read_picture(tmp_path / "in")
    assert np.array_equal(picture.pixels, as_rgb(given))
    assert (picture.is_grey, picture.has_alpha, picture.dtype) == (
        channels in (0, 2),
        channels in (2, 4),
        np.dtype(dtype),
    )
    assert picture.notes == ()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_is_scaled_to_8(bits: int, tmp_path: Path) -> None:
    levels = noise(channels=0) >> (8 - bits)
    image = pyvips.Image.new_from_array((levels * (255 // (2**bits - 1))).astype(np.uint8))
    image.pngsave(str(tmp_path / "in.png"), bitdepth=bits)
    assert np.array_equal(read_picture(tmp_path / "in.png").pixels[..., 1], levels * (255 // (2**bits - 1)))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float16, np.float32])
@pytest.mark.parametrize("channels", [0, 3, 4])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rowsperstrip": 5, "compression": "zlib"}])
def test_tiff_of_every_depth_plane_and_layout(
    channels: int, dtype: type, planar: str, layout: dict[str, object], tmp_path: Path
) -> None:
    if planar == "separate" and channels and (dtype == np.float16 or "tile" in layout):
        pytest.skip("refused, see broken_files")
    given = noise(channels=channels, dtype=dtype)
    stored = given.transpose(2, 0, 1) if planar == "separate" and channels else given
    options: dict[str, Any] = {"planarconfig": planar} if channels else {}
    if channels == 4:
        options["extrasamples"] = ["unassalpha"]
    photometric = "rgb" if channels else "minisblack"
    tifffile.imwrite(tmp_path / "in.tif", stored, photometric=photometric, **options, **layout)
    picture = read_picture(tmp_path / "in.tif")
    expected = as_rgb(given)
    if dtype == np.uint32:
        expected = (expected / (2**32 - 1) * 65535).round()
    elif np.issubdtype(dtype, np.floating):
        expected = (expected.astype(np.float64) * 65535).round()
    assert np.array_equal(picture.pixels, expected)
    assert picture.dtype == (np.uint8 if dtype == np.uint8 else np.uint16)
    assert picture.metadata.dpi is None
    assert len(picture.notes) == (dtype not in (np.uint8, np.uint16))


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_tiff_of_packed_bits_is_scaled(bits: int, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 2**bits, (5, 16))
    write_packed_tiff(tmp_path / "in.tif", levels, bits)
    picture = read_picture(tmp_path / "in.tif")
    white = np.iinfo(picture.dtype).max
    assert picture.dtype == (np.uint16 if bits == 12 else np.uint8)
    assert np.array_equal(picture.pixels[..., 0], (levels / (2**bits - 1) * white).round())
    assert picture.is_grey


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.float16, np.float32])
def test_tiff_whose_white_is_zero(dtype: Any, tmp_path: Path) -> None:
    given = noise(channels=0, dtype=np.uint16).astype(dtype) if dtype == np.int32 else noise(channels=0, dtype=dtype)
    pictures = []
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(tmp_path / "in.tif", given, photometric=photometric)
        pictures.append(read_picture(tmp_path / "in.tif").pixels)
    assert np.array_equal(pictures[1], np.iinfo(pictures[0].dtype).max - pictures[0])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tiff_of_packed_bits_whose_white_is_zero(bits: int, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 2**bits, (5, 16))
    write_packed_tiff(tmp_path / "in.tif", levels, bits, photometric=0)
    pixels = read_picture(tmp_path / "in.tif").pixels
    expected = ((2**bits - 1 - levels) / (2**bits - 1) * np.iinfo(pixels.dtype).max).round()
    assert np.array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_big", [False, True])
def test_tiff_of_both_byte_orders_and_bigtiff(order: str, is_big: bool, tmp_path: Path) -> None:
    given = noise(dtype=np.uint16)
    tifffile.imwrite(tmp_path / "in.tif", given, photometric="rgb", byteorder=order, bigtiff=is_big)
    assert np.array_equal(read_picture(tmp_path / "in.tif").pixels, given)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", None])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_tiff_of_every_compression(mode: str, compression: str | None, tmp_path: Path) -> None:
    if mode == "P" and compression == "jpeg":
        pytest.skip("a palette is not compressed by JPEG")
    image = as_pillow(noise()).convert(mode)
    image.save(tmp_path / "in.tif", compression=compression)
    with Image.open(tmp_path / "in.tif") as stored:
        assert np.array_equal(read_picture(tmp_path / "in.tif").pixels, np.asarray(stored.convert("RGB")))


def test_fax_pages_are_black_and_white(tmp_path: Path) -> None:
    image = as_pillow(noise(channels=0)).convert("1")
    image.save(tmp_path / "in.tif", compression="group4")
    picture = read_picture(tmp_path / "in.tif")
    assert np.array_equal(picture.pixels[..., 0], np.asarray(image.convert("L")))
    assert picture.is_grey


def test_tiff_with_other_channels_than_colours_says_that_they_are_left_out(tmp_path: Path) -> None:
    given = noise(channels=6)
    tifffile.imwrite(tmp_path / "in.tif", given, photometric="rgb", extrasamples=["unspecified"] * 3)
    picture = read_picture(tmp_path / "in.tif")
    assert np.array_equal(picture.pixels, given[..., :3])
    assert picture.notes == ("3 of its 6 channels are neither colour nor alpha and left out",)


def test_premultiplied_alpha_is_divided_out(tmp_path: Path) -> None:
    rgba = noise(channels=4)
    rgba[..., 3] |= 0x80
    stored = rgba.copy()
    stored[..., :3] = rgba[..., :3].astype(int) * rgba[..., 3:] // 255
    tifffile.imwrite(tmp_path / "in.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    pixels = read_picture(tmp_path / "in.tif").pixels
    assert np.array_equal(pixels[..., 3], rgba[..., 3])
    assert np.abs(pixels[..., :3].astype(int) - rgba[..., :3]).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("has_profile", [False, True])
def test_cmyk_becomes_rgb_by_its_profile_or_a_stated_rule(dtype: type, has_profile: bool, tmp_path: Path) -> None:
    given = noise(channels=4, dtype=dtype)
    profile = {"iccprofile": ink_profile()} if has_profile else {}
    tifffile.imwrite(tmp_path / "in.tif", given, photometric="separated", **profile)
    picture = read_picture(tmp_path / "in.tif")
    white = np.iinfo(dtype).max
    if has_profile:
        inks = Image.frombytes("CMYK", (29, 37), (given // (white // 255)).astype(np.uint8).tobytes())
        profiles = ImageCms.ImageCmsProfile(BytesIO(ink_profile())), ImageCms.createProfile("sRGB")
        by_pillow = ImageCms.profileToProfile(inks, *profiles, outputMode="RGB")
        assert np.abs(picture.pixels / (white / 255) - np.asarray(by_pillow).astype(float)).max() < 3
    else:
        light = (white - given.astype(float)) / white
        assert np.abs(picture.pixels - light[..., :3] * light[..., 3:] * white).max() <= 1
    assert len(picture.notes) == 1
    assert "CMYK" in picture.notes[0]
    assert picture.metadata.icc_profile is None
    assert picture.dtype == dtype


@pytest.mark.parametrize("name", ["in.jpg", "in.tif"])
def test_cmyk_of_8_bits_is_what_pillow_makes_of_it(name: str, tmp_path: Path) -> None:
    as_pillow(noise()).convert("CMYK").save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert np.array_equal(read_picture(tmp_path / name).pixels, np.asarray(stored.convert("RGB")))


def test_lab_becomes_srgb(tmp_path: Path) -> None:
    red = np.array([[[53.24, 80.09, 67.20], [100, 0, 0], [0, 0, 0]]])  # of sRGB, D65; the file's white is D50
    deep = np.stack([red[..., 0] / 100 * 65535, *(red[..., i] * 256 for i in (1, 2))], axis=2)
    stored = deep.round().astype(np.int64).astype(np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", stored, photometric="cielab")
    levels = np.stack([red[..., 0] / 100 * 255, red[..., 1], red[..., 2]], axis=2).round().astype(np.int64)
    Image.frombytes("LAB", (3, 1), levels.astype(np.uint8).tobytes()).save(tmp_path / "lab.tif")
    for name, white in (("deep.tif", 65535), ("lab.tif", 255)):
        picture = read_picture(tmp_path / name)
        assert picture.notes == ("CIELAB becomes sRGB",)
        pixels = picture.pixels / white
        assert pixels[0, 1].min() > 0.99
        assert pixels[0, 2].max() < 0.02
        assert pixels[0, 0, 0] > 0.97
        assert pixels[0, 0, 1:].max() < 0.2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_a_pillow_image_of_every_mode_is_read_as_a_file_is(mode: str, tmp_path: Path) -> None:
    rgb = as_pillow(noise())
    grey = np.asarray(rgb.convert("L"))
    if mode in ("I;16", "I", "F"):
        deep = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 257}
        image = Image.fromarray(deep.get(mode, grey.astype(np.float32) / 255))
    elif mode == "LAB":
        image = Image.frombytes("LAB", rgb.size, rgb.tobytes())
    else:
        image = rgb.convert("P").convert("PA") if mode == "PA" else rgb.convert(mode)
    picture = as_picture(image)
    assert (picture.height, picture.width) == (37, 29)
    assert picture.is_grey == (mode in ("1", "L", "LA", "I;16", "I", "F"))
    assert picture.has_alpha == (mode in ("LA", "PA", "RGBA"))
    if mode in ("I;16", "I", "F"):
        assert np.array_equal(picture.pixels[..., 2], grey.astype(np.uint16) * 257)
        assert np.array_equal(np.asarray(picture.rgb)[..., 0], grey)
    if mode not in ("PA", "YCbCr"):
        suffix = "png" if mode in ("P", "I;16") else "tif"
        image.save(tmp_path / f"in.{suffix}")
        assert np.array_equal(read_picture(tmp_path / f"in.{suffix}").pixels, picture.pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2, "quality": 40}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", ["jpg", "JPE", "mpo", "webp", "gif", "png", "none"])
def test_pictures_of_the_web_are_what_pillow_reads(
    ending: str, mode: str, options: dict[str, object], tmp_path: Path
) -> None:
    image = as_pillow(noise(64, 48)).convert(mode)
    kind = {"JPE": "JPEG", "jpg": "JPEG", "mpo": "MPO", "none": "JPEG"}.get(ending, ending.upper())
    image.save(tmp_path / f"in.{ending}", kind, **(options if kind in ("JPEG", "MPO") else {}))
    with Image.open(tmp_path / f"in.{ending}") as stored:
        pixels = read_picture(tmp_path / f"in.{ending}").pixels
        assert np.array_equal(pixels[..., :3], np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize(("name", "mode"), [("in.bmp", "RGB"), ("in.ppm", "RGB"), ("in.pgm", "L"), ("in.jp2", "RGB")])
def test_what_libvips_lacks_is_read_by_pillow(name: str, mode: str, tmp_path: Path) -> None:
    image = as_pillow(noise(64, 48)).convert(mode)
    image.save(tmp_path / name)
    assert np.array_equal(read_picture(tmp_path / name).pixels, np.asarray(image.convert("RGB")))


def test_what_pillow_reduces_is_said(tmp_path: Path) -> None:
    given = noise(dtype=np.uint16)
    (tmp_path / "in.ppm").write_bytes(b"P6 29 37 65535\n" + given.astype(">u2").tobytes())
    picture = read_picture(tmp_path / "in.ppm")
    assert np.abs(picture.pixels.astype(float) - given / 257).max() < 1
    assert picture.notes == ("more than 8 bits per channel are reduced to 8",)
    grey = given[..., 0]
    (tmp_path / "in.pgm").write_bytes(b"P5 29 37 65535\n" + grey.astype(">u2").tobytes())
    assert np.array_equal(read_picture(tmp_path / "in.pgm").pixels[..., 1], grey)


@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (4, np.uint8), (0, np.uint8), (0, np.uint16)])
@pytest.mark.parametrize("ending", ["jp2", "j2k"])
def test_jpeg_2000_keeps_its_bits_and_says_nothing(channels: int, dtype: Any, ending: str, tmp_path: Path) -> None:
    given = noise(channels=channels, dtype=dtype)
    as_pillow(given).save(tmp_path / f"in.{ending}")
    picture = read_picture(tmp_path / f"in.{ending}")
    assert np.array_equal(picture.pixels, as_rgb(given)) and picture.dtype == dtype
    assert picture.notes == ()
    with (tmp_path / f"in.{ending}").open("rb") as file:
        assert reading._bits_of_jpeg_2000(file) == 8 * np.dtype(dtype).itemsize


@pytest.mark.parametrize(("name", "plugin"), [("in.heic", "pillow_heif"), ("in.jxl", "pillow_jxl")])
def test_heic_and_jpeg_xl_are_read_with_their_extra_and_named_without(
    name: str, plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(plugin, reason="pip install 'stablesr-kit[formats]'")
    if plugin == "pillow_heif":
        module.register_heif_opener()
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint8)
    as_pillow(ramp).save(tmp_path / name, exif=exif.tobytes(), quality=95)
    picture = read_picture(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert np.array_equal(picture.pixels, np.asarray(stored.convert("RGB")))
    assert np.abs(picture.pixels.astype(int) - ramp).mean() < 3
    assert b"Camera" in (picture.metadata.exif or b"")
    monkeypatch.setattr(reading, "find_spec", lambda _: None)
    with pytest.raises(ImageError, match=r"is not read here; pip install 'stablesr-kit\[formats\]', or convert it"):
        read_picture(tmp_path / name)


def test_avif_of_10_bits_keeps_them(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint16)
    image = pyvips.Image.new_from_array(ramp).copy(interpretation="rgb16")
    image.heifsave(str(tmp_path / "in.avif"), compression="av1", bitdepth=10, Q=95)
    picture = read_picture(tmp_path / "in.avif")
    assert picture.dtype == np.uint16
    assert len(np.unique(picture.pixels)) > 300
    assert np.abs(picture.pixels.astype(int) - ramp).mean() < 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.jpg", "in.webp"])
def test_pictures_are_upright_in_memory_and_by_bands(orientation: int, name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    as_pillow(noise()).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
        assert np.array_equal(as_picture(stored).pixels, upright)
    picture = open_picture(tmp_path / name)
    assert (picture.height, picture.width) == upright.shape[:2]
    assert np.array_equal(np.concatenate(list(picture.bands(8))), upright)


def test_only_the_first_page_or_frame_is_used_and_said(tmp_path: Path) -> None:
    pages = noise(channels=0, dtype=np.uint16), noise(channels=0, dtype=np.uint16, seed=1)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack(pages), photometric="minisblack")
    frames = [as_pillow(noise(seed=seed)).convert("P") for seed in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("RGB").save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    for name, first in (
        ("pages.tif", as_rgb(pages[0])),
        ("moving.gif", np.asarray(frames[0].convert("RGB"))),
        ("moving.webp", np.asarray(frames[0].convert("RGB"))),
    ):
        picture = read_picture(tmp_path / name)
        assert np.array_equal(picture.pixels[..., :3], first), name
        assert picture.notes == ("only its first frame or page is used",), name


def test_a_png_with_a_gamma_looks_the_same_by_a_profile(tmp_path: Path) -> None:
    linear = struct.pack(">I", 100000)
    wide = struct.pack(">8I", 31270, 32900, 73470, 26530, 11520, 82640, 15660, 1770)  # wide gamut primaries, D65
    given = noise()
    write_png(tmp_path / "in.png", given, png_chunk(b"gAMA", linear) + png_chunk(b"cHRM", wide))
    picture = read_picture(tmp_path / "in.png")
    assert np.array_equal(picture.pixels, given)
    profile = picture.metadata.icc_profile
    assert profile is not None
    # The reference: the chunks' own formulas, in floats.
    x, y = np.array([0.3127, 0.7347, 0.1152, 0.1566]), np.array([0.329, 0.2653, 0.8264, 0.0177])
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    to_xyz = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])
    to_srgb = np.linalg.inv([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    colours = np.array([[[128, 128, 128], [60, 70, 65], [255, 255, 255], [100, 110, 90]]], np.uint8)
    light = np.einsum("ij,hwj->hwi", to_srgb @ to_xyz, colours / 255).clip(0, 1)
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    shown = ImageCms.profileToProfile(
        Image.fromarray(colours), ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), 1
    )
    assert np.abs(np.asarray(shown) - expected).max() < 2


def test_a_png_with_the_gamma_of_srgb_has_no_profile(tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", noise(), png_chunk(b"gAMA", struct.pack(">I", 45455)))
    assert read_picture(tmp_path / "in.png").metadata.icc_profile is None
    write_png(tmp_path / "grey.png", noise(channels=0), png_chunk(b"gAMA", struct.pack(">I", 55556)))
    profile = read_picture(tmp_path / "grey.png").metadata.icc_profile
    assert profile is not None
    assert profile[16:20] == b"GRAY"
    with pytest.raises(ValueError, match="describes no colours"):
        profile_from(0.0, None)


def test_a_profile_of_other_pixels_is_left_out_and_said(tmp_path: Path) -> None:
    as_pillow(noise(channels=0)).save(tmp_path / "grey.png", icc_profile=SRGB)
    picture = read_picture(tmp_path / "grey.png")
    assert picture.metadata.icc_profile is None
    assert picture.notes == ("its colour profile is of another kind of pixels and is left out",)


@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.jpg", "in.webp"])
def test_content_is_read_as_a_file_is(name: str, tmp_path: Path) -> None:
    as_pillow(noise(64, 48)).save(tmp_path / name)
    given = read_picture((tmp_path / name).read_bytes())
    assert np.array_equal(given.pixels, read_picture(tmp_path / name).pixels)
    with pytest.raises(ImageError, match="^truncated or damaged"):
        read_picture((tmp_path / name).read_bytes()[:-1000])


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    for seed in range(2):
        as_pillow(noise(seed=seed)).save(tmp_path / "in.png")
        assert np.array_equal(read_picture(tmp_path / "in.png").pixels, noise(seed=seed))


def broken_files(folder: Path) -> dict[str, str]:
    """One file for each way to be wrong, and what the message must say."""
    whole = noise(64, 64)
    for name, options in (("jpg", {}), ("tif", {"compression": "tiff_lzw"}), ("webp", {"lossless": True}), ("png", {})):
        as_pillow(whole).save(folder / f"whole.{name}", **options)
        (folder / f"cut.{name}").write_bytes((folder / f"whole.{name}").read_bytes()[:-1500])
    write_png(folder / "bomb.png", np.zeros((1, 1, 3), np.uint8))
    bomb = (folder / "bomb.png").read_bytes()
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(bomb[:8] + png_chunk(b"IHDR", header) + bomb[33:])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture at all")
    (folder / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    tifffile.imwrite(folder / "nan.tif", np.full((8, 8), np.nan, np.float32), photometric="minisblack")
    tifffile.imwrite(folder / "bright.tif", np.full((8, 8, 3), 2, np.float32), photometric="rgb")
    tifffile.imwrite(folder / "double.tif", np.full((8, 8, 3), 0.5), photometric="rgb")
    write_packed_tiff(folder / "five.tif", np.zeros((8, 8), int), bits=5)
    tifffile.imwrite(folder / "signed.tif", np.full((8, 8, 3), 5, np.int16), photometric="rgb")
    tifffile.imwrite(folder / "negative.tif", np.full((8, 8), -5, np.int32), photometric="minisblack")
    tifffile.imwrite(folder / "inks.tif", noise(channels=4), photometric="separated", extratags=[(332, 3, 1, 2, True)])
    planes = {"photometric": "rgb", "planarconfig": "separate"}
    tifffile.imwrite(folder / "planes.tif", noise().transpose(2, 0, 1), tile=(16, 16), **planes)
    tifffile.imwrite(folder / "half.tif", noise(dtype=np.float16).transpose(2, 0, 1), **planes)
    tifffile.imwrite(folder / "raw.dng", noise(), photometric="rgb", extratags=[(50706, 1, 4, b"\1\4\0\0", True)])
    tifffile.imwrite(folder / "thumbnail.nef", noise(), photometric="rgb", subfiletype=1)
    tifffile.imwrite(folder / "lzma.tif", noise(), photometric="rgb", compression="lzma")
    write_packed_tiff(folder / "twelve.tif", np.zeros((8, 8), int), bits=12, photometric=0)
    (folder / "colour.pfm").write_bytes(b"PF\n2 1\n-1.0\n" + bytes(24))
    as_pillow(noise()).save(folder / "picture.tga")
    return {
        "twelve.tif": "12-bit numbers whose white is zero are not read; convert it",
        "lzma.tif": "its compression is not read; convert it",
        "colour.pfm": "not a picture of a format that is read, or damaged; give one of",
        "picture.tga": "not a picture of a format that is read, or damaged; give one of",
        "empty.png": "an empty file",
        "text.jpg": "not a picture of a format that is read, or damaged; give one of AVIF, BMP",
        "drawing.png": "not a picture",
        "program.png": "not a picture",
        "cut.png": "truncated or damaged",
        "cut.jpg": "truncated or damaged",
        "cut.tif": "truncated or damaged",
        "cut.webp": "truncated or damaged",
        "bomb.png": "30000x30000 is 900 million pixels, more than the limit of 100; scale or crop it first",
        "nan.tif": "its float numbers go from nan to nan, expected 0",
        "bright.tif": "its float numbers go from 2 to 2, expected 0 .black. to 1 .white.",
        "double.tif": "its numbers are of a depth that is not read; convert it",
        "five.tif": "its numbers are of a depth that is not read; convert it",
        "signed.tif": "its numbers are of type short; expected unsigned ones",
        "negative.tif": "its signed numbers go from -5 to -5, expected 0 .black. to 65535",
        "inks.tif": "its inks are not read; expected CMYK of 8 or 16 bits: convert it first",
        "planes.tif": "its colours lie in separate planes of tiles; convert it to PNG",
        "half.tif": "16-bit float numbers in separate planes are not read; convert it to 32-bit float",
        "raw.dng": "a camera's raw file, not a developed picture",
        "thumbnail.nef": "its first picture is only a thumbnail",
        "missing.png": "no such file or folder; check the name",
        ".": "a folder or device, not a picture",
        os.devnull: "a folder or device, not a picture",
    }


def test_broken_and_foreign_files_are_one_true_line_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, message in broken_files(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match=message) as caught:
                read_picture(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: "), name
        assert "\n" not in str(caught.value), name
    assert capfd.readouterr().err == ""


def test_a_mode_that_no_file_has_is_refused() -> None:
    with pytest.raises(ImageError, match="colour mode HSV is not supported; convert it to RGB"):
        as_picture(as_pillow(noise()).convert("HSV"))


def test_the_pixel_limit_is_an_argument(tmp_path: Path) -> None:
    as_pillow(noise()).save(tmp_path / "in.png")
    assert read_picture(tmp_path / "in.png", max_pixels=29 * 37).rgb.size == (29, 37)
    with pytest.raises(ImageError, match="29x37 is .*; ask somebody"):
        open_picture(tmp_path / "in.png", max_pixels=29 * 37 - 1, advice="ask somebody")


def test_memory_holds_bands_and_never_the_picture(tmp_path: Path) -> None:
    pyvips.Image.black(1024, 8192, bands=3).copy(interpretation="srgb").tiffsave(str(tmp_path / "in.tif"), tile=True)
    picture = open_picture(tmp_path / "in.tif")
    tracemalloc.start()
    count = sum(len(band) for band in picture.bands(16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8192
    assert peak < 20 * 16 * 1024 * 3
