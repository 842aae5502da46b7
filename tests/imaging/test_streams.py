"""Pictures by bands: the same colours as pictures held whole, 16 bits kept, memory that does not grow with them."""

import resource
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from stablesr_kit.errors import ImageError, OutputError
from stablesr_kit.imaging.files import read_picture, write_picture
from stablesr_kit.imaging.streams import StreamedPicture, open_stream, write_stream

tifffile = pytest.importorskip("tifffile")
pyvips = pytest.importorskip("pyvips", reason="pip install 'stablesr-kit[huge]'")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(height: int = 37, width: int = 29, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def whole(picture: StreamedPicture, rows: int = 8) -> np.ndarray:
    return np.concatenate(list(picture.bands(rows)))


def in_bands(array: np.ndarray, rows: int = 10) -> Iterator[np.ndarray]:
    return (array[top : top + rows] for top in range(0, len(array), rows))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *[(mode, "in.tif") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK")],
        *[(mode, "in.png") for mode in ("1", "L", "LA", "P", "P with transparency", "RGB", "RGBA")],
        *[(mode, "in.jpg") for mode in ("L", "RGB", "CMYK")],
    ],
)
def test_bands_are_the_picture_that_is_read_whole(mode: str, name: str, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(channels=4))
    if mode == "RGBX":
        image = Image.frombytes("RGBX", image.size, image.tobytes())
    elif mode != "RGBA":
        image = image.convert("LA" if mode == "LA" else "RGB").convert(mode.split()[0])
    image.save(tmp_path / name, **({"transparency": 3} if "with" in mode else {}))

    streamed, read = open_stream(tmp_path / name), read_picture(tmp_path / name)

    values = whole(streamed)
    assert np.array_equal(values[..., :3], np.asarray(read.rgb))
    assert streamed.has_alpha == (read.alpha is not None)
    if read.alpha is not None:
        assert np.array_equal(values[..., 3], np.asarray(read.alpha))
    assert (streamed.height, streamed.width, streamed.is_grey) == (*read.rgb.size[::-1], read.is_grey)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.jpg"])
def test_bands_are_upright_and_keep_profile_and_exif(orientation: int, name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Artist] = "A. Painter"
    Image.fromarray(pixels()).save(tmp_path / name, exif=exif, icc_profile=SRGB)
    streamed, read = open_stream(tmp_path / name), read_picture(tmp_path / name)
    assert np.array_equal(whole(streamed), np.asarray(read.rgb))
    assert (streamed.icc_profile, streamed.exif) == (read.icc_profile, read.exif)
    assert streamed.exif is not None


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("name", ["out.png", "out.tif"])
def test_results_are_those_of_pictures_written_whole(kind: str, name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Painter"
    Image.fromarray(pixels(channels=4)).convert(kind).save(tmp_path / "in.png", exif=exif)
    streamed, read = open_stream(tmp_path / "in.png"), read_picture(tmp_path / "in.png")
    restored = pixels(148, 116)
    write_picture(tmp_path / f"whole_{name}", Image.fromarray(restored), read)
    write_stream(tmp_path / name, in_bands(restored), 148, 116, streamed)

    with Image.open(tmp_path / name) as by_bands, Image.open(tmp_path / f"whole_{name}") as at_once:
        assert by_bands.mode == at_once.mode == kind
        assert np.array_equal(np.asarray(by_bands), np.asarray(at_once))
        if name.endswith("png"):
            assert by_bands.getexif()[ExifTags.Base.Artist] == "A. Painter"


@pytest.mark.parametrize(
    ("channels", "name"),
    [*[(channels, "deep.png") for channels in (1, 2, 3, 4)], *[(channels, "deep.tif") for channels in (1, 3, 4)]],
)
def test_16_bits_and_the_profile_come_back_bit_by_bit(channels: int, name: str, tmp_path: Path) -> None:
    given = pixels(channels=channels, dtype=np.uint16)
    image = pyvips.Image.new_from_array(given, interpretation="grey16" if channels < 3 else "rgb16")
    if channels > 2:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", SRGB)
    image.write_to_file(str(tmp_path / f"in_{name}"))
    streamed = open_stream(tmp_path / f"in_{name}")
    assert streamed.dtype == np.uint16
    assert streamed.is_grey == (channels < 3)
    values = whole(streamed)
    colours = given[..., :3] if channels > 2 else given[..., :1].repeat(3, axis=2)
    assert np.array_equal(values[..., :3], colours)
    assert streamed.has_alpha == (channels in (2, 4))
    write_stream(tmp_path / name, in_bands(colours), *colours.shape[:2], streamed)
    result = open_stream(tmp_path / name)
    assert result.icc_profile == (SRGB if channels > 2 else None)
    assert np.array_equal(whole(result), values)
    if name.endswith("tif"):
        assert np.array_equal(tifffile.imread(tmp_path / name).reshape(given.shape), given)


@pytest.mark.parametrize("layout", [{"tile": (16, 16)}, {"rowsperstrip": 5}, {"rowsperstrip": 37}, {"bigtiff": True}])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_of_any_layout_is_read(layout: dict[str, object], compression: str | None, tmp_path: Path) -> None:
    given = pixels()
    options = dict(layout)
    with tifffile.TiffWriter(tmp_path / "in.tif", bigtiff=bool(options.pop("bigtiff", False))) as file:
        file.write(given, photometric="rgb", compression=compression, **options)
    assert np.array_equal(whole(open_stream(tmp_path / "in.tif")), given)


def test_memory_holds_bands_and_never_the_picture(tmp_path: Path) -> None:
    height, width, rows = 4096, 1024, 16
    source = StreamedPicture(
        path=tmp_path / "none",
        height=height // 4,
        width=width // 4,
        dtype=np.dtype(np.uint8),
        has_alpha=False,
        is_grey=False,
        icc_profile=None,
        exif=None,
    )
    band = pixels(rows, width)
    tracemalloc.start()
    write_stream(tmp_path / "out.tif", (band for _ in range(height // rows)), height, width, source)
    count = sum(len(read) for read in open_stream(tmp_path / "out.tif").bands(rows))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == height
    assert peak < 10 * band.nbytes < height * width * 3 / 10


def test_a_truncated_or_foreign_file_is_one_line(tmp_path: Path) -> None:
    for name in ("cut.png", "cut.tif", "cut.jpg"):
        Image.fromarray(pixels(300, 300)).save(tmp_path / f"whole_{name}")
        content = (tmp_path / f"whole_{name}").read_bytes()
        for part in (len(content) // 2, len(content) - 2000, 30):
            (tmp_path / name).write_bytes(content[:part])
            with pytest.raises(ImageError, match=rf"{name}: truncated or damaged \(.+\); get a whole copy") as caught:
                whole(open_stream(tmp_path / name))
            assert "\n" not in str(caught.value)
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(pixels()[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(pixels()).convert("LAB").save(tmp_path / "lab.tif")
    for name, message in {
        "text.png": "not a picture that can be streamed; give PNG, JPEG or TIFF",
        "missing.png": "cannot be read",
        "float.tif": "numbers of type float are not streamed",
        "lab.tif": "colour mode LAB is not supported",
    }.items():
        with pytest.raises(ImageError, match=f"{name}: {message}"):
            open_stream(tmp_path / name)
    Image.fromarray(pixels()).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match=r"29x37 is .* million pixels, more than the limit"):
        open_stream(tmp_path / "large.png", max_pixels=1000)


def test_what_fails_while_writing_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "in.png")
    source = open_stream(tmp_path / "in.png")
    out = tmp_path / "out.png"
    out.write_text("older")

    def failing() -> Iterator[np.ndarray]:
        yield pixels(10, 29)
        raise ImageError("no more")

    with pytest.raises(ImageError, match="no more"):
        write_stream(out, failing(), 37, 29, source)
    with pytest.raises(ValueError, match="expected 3219"):
        write_stream(out, [pixels(10, 29)], 37, 29, source)
    with pytest.raises(OutputError, match=r"out\.jpg: .* written as \.png, \.tif, \.tiff only"):
        write_stream(tmp_path / "out.jpg", [pixels()], 37, 29, source)
    with pytest.raises(OutputError, match=r"cannot be written \(No such file"):
        write_stream(tmp_path / "missing" / "out.png", [pixels()], 37, 29, source)
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]


@pytest.mark.parametrize("limit", [1000, 3300])
def test_a_disk_that_fills_up_is_one_line(limit: int, tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "in.png")
    source = open_stream(tmp_path / "in.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"out\.tif: cannot be written \(.+\); free space") as caught:
            write_stream(tmp_path / "out.tif", in_bands(pixels()), 37, 29, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_without_libvips_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(ImageError, match=r"pip install 'stablesr-kit\[huge\]'"):
        open_stream(tmp_path / "in.png")
