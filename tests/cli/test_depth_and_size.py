"""Pictures that are deep or large, through `stablesr restore`: by rows the same pixels, 16 bits in and out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablesr_kit.cli import jobs, restorer
from stablesr_kit.imaging.reading import read_picture
from tests.helpers.cli_runs import error_lines, pixels_of, stablesr
from tests.helpers.picture_files import SRGB, as_pillow, noise, write_png

PIXELS = noise(10, 13, 4)


@pytest.mark.parametrize(("options", "modes"), [(("--tile", "none"), ("RGBA", "RGB", "L")), (("--tile", 32), ("RGB",))])
def test_a_large_picture_lies_on_disk_with_the_same_pixels(
    options: tuple[object, ...], modes: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for mode in modes:
        as_pillow(PIXELS).convert(mode).save(photos / f"{mode}.png", icc_profile=None if mode == "L" else SRGB)
    arguments = ("restore", photos, "--model", model, "--compare", *options, "-o")
    assert stablesr(*arguments, tmp_path / "held").exit_code == 0
    monkeypatch.setattr(restorer, "MAX_PIXELS", 100)
    assert stablesr(*arguments, tmp_path / "rows").exit_code == 0
    for mode in modes:
        held, rows = (pixels_of(tmp_path / folder / f"{mode}.png") for folder in ("held", "rows"))
        assert np.array_equal(held, rows)
        assert read_picture(tmp_path / "rows" / f"{mode}.png").metadata.icc_profile == (None if mode == "L" else SRGB)
        pair = pixels_of(tmp_path / "rows" / f"{mode}_compare.png")
        assert pair.shape == (40, 2 * 52 + 1, 3)
        assert np.array_equal(pair, pixels_of(tmp_path / "held" / f"{mode}_compare.png"))
        if mode != "L":
            assert np.array_equal(pair[:, 53:], held[..., :3])
    assert not (tmp_path / "rows" / ".stablesr").exists()


@pytest.mark.parametrize("name", ["out.png", "out.tif"])
def test_16_bits_stay_16_bits(name: str, model: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "deep.png", PIXELS.astype(np.uint16) * 257)
    as_pillow(PIXELS).save(tmp_path / "shallow.png")
    for source, target in (("deep.png", name), ("shallow.png", f"shallow_{name}")):
        result = stablesr("restore", tmp_path / source, "-o", tmp_path / target, "--model", model)
        assert (result.exit_code, result.stderr) == (0, "")
    restored = read_picture(tmp_path / name)
    assert (restored.dtype, restored.has_alpha) == (np.dtype(np.uint16), True)
    assert len(np.unique(restored.pixels % 257)) > 100
    assert np.abs(restored.pixels / 257 - pixels_of(tmp_path / f"shallow_{name}"))[..., :3].max() <= 1


def test_16_bits_become_8_where_the_format_holds_no_more_and_it_is_said(model: Path, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    result = stablesr("restore", tmp_path / "deep.tif", "-o", tmp_path / "out.jpg", "--model", model)
    note = f"note: {tmp_path / 'deep.tif'}: JPEG cannot hold and leaves out: 16 bits (8 are kept)"
    assert (result.exit_code, error_lines(result)) == (0, [note])
    assert pixels_of(tmp_path / "out.jpg").shape == (40, 52)


@pytest.mark.parametrize("command", ["faces", "degrade"])
def test_16_bits_stay_16_bits_in_every_command(command: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 96 * 96).reshape(96, 96, 1).repeat(3, axis=2).astype(np.uint16)
    write_png(tmp_path / "deep.png", ramp)
    options = ("--background", "none") if command == "faces" else ()
    result = stablesr(command, tmp_path / "deep.png", "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 0, result.stderr
    assert read_picture(tmp_path / "out.png").dtype == np.uint16


def test_a_picture_above_the_limit_needs_the_users_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_PIXELS", 100)
    as_pillow(PIXELS).save(tmp_path / "in.png")
    arguments = ("restore", tmp_path / "in.png", "--model", model, "-o")
    refused = stablesr(*arguments, tmp_path / "out.png")
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: {tmp_path / 'in.png'}: 13x10 is 0 million pixels, more than the limit of 0.0001; "
        "give --huge if you trust the file, or scale or crop it first\n"
    )
    assert stablesr(*arguments, tmp_path / "out.png", "--huge").exit_code == 0
    assert pixels_of(tmp_path / "out.png").shape == (40, 52, 4)


def test_what_no_file_can_hold_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restorer, "load_pipeline", None)
    as_pillow(noise(8, 5000)).save(tmp_path / "long.png")
    for name, scale, message in (
        ("out.webp", 4, "out.webp: the result would be 20000x32, and WEBP holds 16383 pixels a side at most; choose"),
        ("out.jpg", 14, "out.jpg: the result would be 70000x112, and JPEG holds 65500 pixels a side at most; choose"),
    ):
        result = stablesr("restore", tmp_path / "long.png", "-o", tmp_path / name, "--scale", scale)
        assert result.exit_code == 1
        assert [line for line in error_lines(result) if message in line], result.stderr
        assert not (tmp_path / name).exists()
