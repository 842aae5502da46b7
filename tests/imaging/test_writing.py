"""Results keep what their sources had, in every format, whole or not at all."""

import os
import stat
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablesr_kit.errors import ImageError, OutputError
from stablesr_kit.imaging.reading import Picture, as_picture, open_picture, read_picture
from stablesr_kit.imaging.writing import check_output, left_out, output_dtype, write_bands, write_picture
from tests.helpers.file_limits import files_end_at
from tests.helpers.picture_files import SRGB, as_pillow, as_rgb, noise, write_png

tifffile = pytest.importorskip("tifffile")

PLAIN = as_picture(as_pillow(noise()))


def in_bands(array: np.ndarray, rows: int = 10) -> Iterator[np.ndarray]:
    return (array[top : top + rows] for top in range(0, len(array), rows))


def written(path: Path, values: np.ndarray, source: Picture) -> np.ndarray:
    write_bands(path, in_bands(values), values.shape[0], values.shape[1], source)
    return read_picture(path).pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.TIFF"])
def test_what_is_read_is_written_and_read_again_bit_by_bit(
    name: str, channels: int, dtype: type, tmp_path: Path
) -> None:
    given = noise(channels=channels, dtype=dtype)
    write_png(tmp_path / "in.png", given)
    source = read_picture(tmp_path / "in.png")
    assert output_dtype(tmp_path / name, source) is dtype
    assert np.array_equal(written(tmp_path / name, source.pixels[..., :3], source), as_rgb(given))
    if name == "out.tif":
        assert np.array_equal(tifffile.imread(tmp_path / name).reshape(given.shape), given)
    elif dtype == np.uint8:
        with Image.open(tmp_path / name) as stored:
            assert np.array_equal(np.asarray(stored), given)
            assert stored.mode == {0: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.png", name])


@pytest.mark.parametrize(
    ("name", "options"), [("out.jpg", {"quality": 95, "subsampling": 0}), ("out.webp", {"quality": 95})]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy_formats_are_what_pillow_writes_at_that_quality(
    name: str, options: dict[str, int], mode: str, tmp_path: Path
) -> None:
    image = as_pillow(noise(64, 48)).convert(mode)
    image.save(tmp_path / f"pillow_{name}", **options)
    source = as_picture(image)
    pixels = written(tmp_path / name, source.pixels, source)
    if mode == "RGB" or name == "out.jpg":
        assert np.array_equal(pixels, read_picture(tmp_path / f"pillow_{name}").pixels)
    else:
        assert np.abs(pixels.astype(int) - source.pixels).mean() < 4


def test_16_bits_become_8_where_the_format_holds_no_more_and_it_is_said(tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", noise(channels=4, dtype=np.uint16))
    source = read_picture(tmp_path / "in.png")
    assert output_dtype(tmp_path / "out.webp", source) is np.uint8
    assert left_out(tmp_path / "out.webp", source) == ["16 bits (8 are kept)"]
    assert left_out(tmp_path / "out.tif", source) == []
    pixels = written(tmp_path / "out.webp", np.asarray(source.rgb), source)
    assert np.array_equal(pixels[..., 3], np.asarray(source.alpha))


@pytest.mark.parametrize("name", ["out.png", "out.webp", "out.tif"])
def test_alpha_is_enlarged_with_the_picture(name: str, tmp_path: Path) -> None:
    given = noise(12, 17, 4)
    given[..., 3] = np.where(np.arange(17) < 8, 0, 255)
    source = as_picture(as_pillow(given))
    alpha = written(tmp_path / name, noise(48, 68), source)[..., 3]
    expected = as_pillow(given[..., 3]).resize((68, 48), Image.Resampling.BICUBIC)
    assert np.array_equal(alpha, np.asarray(expected))
    with pytest.raises(OutputError, match=r"out\.jpg: JPEG cannot hold the transparency"):
        write_picture(tmp_path / "out.jpg", source.rgb, source)


def test_a_whole_picture_is_written_in_the_depth_of_its_source(tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", noise(dtype=np.uint16))
    source = read_picture(tmp_path / "in.png")
    write_picture(tmp_path / "out.png", source.rgb, source)
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, np.asarray(source.rgb).astype(np.uint16) * 257)


def test_the_profile_is_kept_in_every_format(tmp_path: Path) -> None:
    source = replace(PLAIN, metadata=replace(PLAIN.metadata, icc_profile=SRGB))
    for name in ("out.png", "out.jpg", "out.tif", "out.webp"):
        write_picture(tmp_path / name, source.rgb, source)
        with Image.open(tmp_path / name) as stored:
            assert stored.info["icc_profile"] == SRGB


def test_memory_holds_bands_and_never_the_picture(tmp_path: Path) -> None:
    band = noise(16, 1024)
    source = replace(PLAIN, height=1024, width=256)
    tracemalloc.start()
    write_bands(tmp_path / "out.tif", (band for _ in range(256)), 4096, 1024, source)
    count = sum(len(read) for read in open_picture(tmp_path / "out.tif").bands(16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4096
    assert peak < 20 * band.nbytes


def test_formats_refuse_what_is_too_long_for_them_before_the_work() -> None:
    for name, longest in (("out.webp", 16383), ("out.jpg", 65500)):
        check_output(Path(name), PLAIN, (longest, 5))
        with pytest.raises(
            OutputError, match=rf"{name}: the result would be 5x{longest + 1}, .* {longest} pixels a side"
        ):
            check_output(Path(name), PLAIN, (longest + 1, 5))
    check_output(Path("out.tif"), PLAIN, (100_000, 200_000))


def test_unknown_suffixes_name_the_known_ones(tmp_path: Path) -> None:
    for name, given in (("out.bmp", "suffix '.bmp' is not supported"), ("out", "no suffix")):
        with pytest.raises(OutputError, match=given + r"; use one of \.png, \.jpg"):
            check_output(tmp_path / name)


def test_a_result_replaces_an_older_one_with_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("older")
    write_picture(tmp_path / "out.png", PLAIN.rgb, PLAIN)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), PLAIN.pixels)
    (tmp_path / "probe").touch()
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == stat.S_IMODE((tmp_path / "probe").stat().st_mode)


@pytest.mark.parametrize("limit", [1000, 3300, 4000])
@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.jpg", "out.webp"])
def test_a_disk_that_fills_up_leaves_the_older_file_and_nothing_else(name: str, limit: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text("older")
    pixels = noise(74, 58)
    with (
        files_end_at(limit),
        pytest.raises(
            OutputError, match=rf"{name}: cannot be written \(.+\), \d+ MB are free there; free space"
        ) as caught,
    ):
        write_bands(tmp_path / name, in_bands(pixels), 74, 58, PLAIN)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_fails_while_writing_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_text("older")

    def failing() -> Iterator[np.ndarray]:
        yield noise(10)
        raise ImageError("no more")

    with pytest.raises(ImageError, match="no more"):
        write_bands(out, failing(), 37, 29, PLAIN)
    with pytest.raises(ValueError, match="expected 3219"):
        write_bands(out, [noise(10)], 37, 29, PLAIN)
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_picture(tmp_path / "out.png", PLAIN.rgb, PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "file" / "out.png", tmp_path / "missing" / "out.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write_picture(target, PLAIN.rgb, PLAIN)
        assert str(caught.value).startswith(f"{target}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
