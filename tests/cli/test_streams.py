"""`stablesr restore` on deep and large pictures: by rows, to the pixels that come out when they are held whole."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from typer.testing import CliRunner, Result

from stablesr_kit.cli import app, streamed_files
from stablesr_kit.imaging.streams import open_stream

pyvips = pytest.importorskip("pyvips", reason="pip install 'stablesr-kit[huge]'")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 13, 4), dtype=np.uint8)


def restore(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["restore", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("options", "modes"), [(("--tile", "none"), ("RGBA", "RGB", "L")), (("--tile", 32), ("RGB",))])
def test_a_large_picture_is_written_by_rows_with_the_same_pixels(
    options: tuple[object, ...],
    modes: tuple[str, ...],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for mode in modes:
        Image.fromarray(PIXELS).convert(mode).save(photos / f"{mode}.png", icc_profile=None if mode == "L" else SRGB)
    arguments = (photos, "--model", model, "--compare", *options, "-o")
    assert restore(*arguments, tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(streamed_files, "MAX_PIXELS", 1000)
    assert restore(*arguments, tmp_path / "rows").exit_code == 0
    for mode in modes:
        whole, rows = (pixels_of(tmp_path / folder / f"{mode}.png") for folder in ("whole", "rows"))
        assert np.array_equal(whole, rows)
        assert open_stream(tmp_path / "rows" / f"{mode}.png").icc_profile == (None if mode == "L" else SRGB)
        pair = pixels_of(tmp_path / "rows" / f"{mode}_compare.png")
        assert pair.shape == (40, 2 * 52 + 1, 3)
        colours = whole[..., :3] if mode != "L" else None
        assert colours is None or np.array_equal(pair[:, 53:], colours)
        whole_pair = pixels_of(tmp_path / "whole" / f"{mode}_compare.png").astype(int)
        assert np.abs(pair[:, :52] - whole_pair[:, :52]).mean() < 6  # libraries differ in what bicubic is
    assert [path.name for path in (tmp_path / "rows" / ".stablesr").iterdir()] == ["journal.jsonl"]


@pytest.mark.parametrize("name", ["out.png", "out.tif"])
def test_16_bits_stay_16_bits(name: str, model: Path, tmp_path: Path) -> None:
    deep = pyvips.Image.new_from_array(PIXELS.astype(np.uint16) * 257, interpretation="rgb16")
    deep.set_type(pyvips.GValue.blob_type, "icc-profile-data", SRGB)
    deep.write_to_file(str(tmp_path / "deep.tif"))
    Image.fromarray(PIXELS).save(tmp_path / "shallow.png")
    for source, target in (("deep.tif", name), ("shallow.png", f"shallow_{name}")):
        result = restore(tmp_path / source, "-o", tmp_path / target, "--model", model)
        assert (result.exit_code, result.stderr) == (0, "")
    streamed = open_stream(tmp_path / name)
    assert (streamed.dtype, streamed.has_alpha, streamed.icc_profile) == (np.uint16, True, SRGB)
    restored = np.concatenate(list(streamed.bands()))
    assert len(np.unique(restored % 257)) > 100
    assert np.abs(restored / 257 - pixels_of(tmp_path / f"shallow_{name}"))[..., :3].max() <= 1


def test_a_picture_above_the_limit_needs_the_users_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_files, "MAX_PIXELS", 100)
    Image.fromarray(PIXELS).save(tmp_path / "in.png")
    arguments = (tmp_path / "in.png", "--model", model, "-o")
    refused = restore(*arguments, tmp_path / "out.png")
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: {tmp_path / 'in.png'}: 13x10 is 0 million pixels, more than the limit of 0.0001; "
        "give --huge if you trust the file, or scale or crop it first\n"
    )
    assert restore(*arguments, tmp_path / "out.png", "--huge").exit_code == 0
    assert pixels_of(tmp_path / "out.png").shape == (40, 52, 4)
    unwritable = restore(*arguments, tmp_path / "out.webp", "--huge")
    assert unwritable.exit_code == 1
    assert unwritable.stderr.startswith(f"error: {tmp_path / 'out.webp'}: a picture this large or deep is written as")


def test_without_libvips_or_room_for_them_16_bits_become_8_and_it_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    reduced = f"note: {tmp_path / 'deep.tif'}: more than 8 bits per channel are reduced to 8\n"
    result = restore(tmp_path / "deep.tif", "-o", tmp_path / "out.jpg", "--model", model)
    assert (result.exit_code, result.stderr) == (0, reduced)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    result = restore(tmp_path / "deep.tif", "-o", tmp_path / "out.png", "--model", model)
    hint = f"note: {tmp_path / 'deep.tif'}: pip install 'stablesr-kit[huge]' keeps 16 bits\n"
    assert (result.exit_code, result.stderr) == (0, reduced + hint)
    assert pixels_of(tmp_path / "out.png").dtype == np.uint8
