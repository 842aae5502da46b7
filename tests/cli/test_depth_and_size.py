"""Pictures that are deep or large, through `stablesr restore`: by rows the same pixels, 16 bits in and out."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablesr_kit.cli import jobs, restorer
from stablesr_kit.cli.messages import Notes
from stablesr_kit.imaging.reading import read_picture
from tests.helpers.cli_runs import error_lines, pixels_of, stablesr
from tests.helpers.picture_files import SRGB, as_pillow, noise, write_png
from tests.helpers.tiny import tiny_pipeline

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


def test_a_scale_below_the_models_costs_what_is_said_and_coarse_makes_it_as_it_is(tmp_path: Path) -> None:
    photo, folder = tmp_path / "photo.png", tmp_path / "model"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(photo)
    tiny_pipeline(with_text=False, working_scale=4).save_pretrained(folder)

    def restored(name: str, *options: object) -> tuple[list[str], np.ndarray]:
        result = stablesr("restore", photo, "-o", tmp_path / name, "--model", folder, *options)
        assert result.exit_code == 0
        return error_lines(result), pixels_of(tmp_path / name)

    lines, fine = restored("fine.png", "--scale", 2)
    assert lines == [
        "plan: model works at scale 4: results are made there and reduced to scale 2, which takes about 4 times as "
        "long as --coarse, which makes them at scale 2"
    ]
    lines, coarse = restored("coarse.png", "--scale", 2, "--coarse")
    assert lines == [] and coarse.shape == fine.shape == (24, 18, 3)
    lines, large = restored("large.png")
    assert lines == []
    by_pillow = np.asarray(Image.fromarray(large).resize((18, 24), Image.Resampling.LANCZOS))
    distances = [np.abs(by_pillow.astype(int) - one).mean() for one in (fine, coarse)]
    assert distances[0] < 1 and distances[1] > 5  # Pillow's was rounded and clipped before
    again = stablesr("restore", photo, "-o", tmp_path / "coarse.png", "--model", folder, "--scale", 2, "--resume")
    assert again.exit_code == 2 and "coarse" in again.stderr


def test_a_warning_names_the_picture(model: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "sharp.png", noise(330, 310, 3))
    handler, logger = Notes(), logging.getLogger("stablesr_kit")
    logger.addHandler(handler)  # as the program does
    try:
        result = stablesr("restore", tmp_path / "sharp.png", "-o", tmp_path / "out.png", "--model", model, "--scale", 1)
    finally:
        logger.removeHandler(handler)
    (line,) = (line for line in error_lines(result) if not line.startswith("plan: "))
    assert line.startswith(f"note: {tmp_path / 'sharp.png'}: the result at the picture's size differs much")
