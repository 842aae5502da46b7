"""`stablesr degrade` from end to end: files, folders, presets, exit statuses, one-line errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from stablesr_kit.imaging.degradations import PRESETS
from stablesr_kit.imaging.degradations.filtering import usm_sharpen
from tests.helpers.cli_runs import pixels_of, stablesr
from tests.helpers.degradation_pictures import photo_like


def degrade(*arguments: object) -> Result:
    return stablesr("degrade", *arguments)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(photo_like(2, 98, 115)):
        pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_folder_is_degraded_reproducibly_and_each_picture_for_itself(photos: Path, tmp_path: Path) -> None:
    result = degrade(photos, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"2 degraded: {tmp_path / 'out'}\n"
    degrade(photos / "1.png", "-o", tmp_path / "one.png")
    assert np.array_equal(pixels_of(tmp_path / "one.png"), pixels_of(tmp_path / "out" / "1.png"))
    assert pixels_of(tmp_path / "one.png").shape == (98, 115, 3)
    degrade(photos / "1.png", "-o", tmp_path / "other.png", "--seed", 1)
    assert not np.array_equal(pixels_of(tmp_path / "one.png"), pixels_of(tmp_path / "other.png"))


def test_pairs_for_four_times_are_cut_to_whole_multiples(photos: Path, tmp_path: Path) -> None:
    result = degrade(photos / "0.png", "-o", tmp_path / "lq.png", "--preset", "bicubic", "--scale", 4, "--save-hq")
    assert result.exit_code == 0
    lq, hq = pixels_of(tmp_path / "lq.png"), pixels_of(tmp_path / "lq_hq.png")
    assert (lq.shape, hq.shape) == ((24, 28, 3), (96, 112, 3))
    assert np.array_equal(hq, pixels_of(photos / "0.png")[:96, :112])
    expected = np.asarray(Image.fromarray(hq).resize((28, 24), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(lq - expected).mean() < 6  # enlarged and reduced once more


def test_the_good_picture_is_the_target_of_the_preset(photos: Path, tmp_path: Path) -> None:
    degrade(photos / "0.png", "-o", tmp_path / "lq.png", "--save-hq")
    picture = torch.from_numpy(pixels_of(photos / "0.png").copy()).permute(2, 0, 1)[None] / 255
    sharp = (usm_sharpen(picture)[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(pixels_of(tmp_path / "lq_hq.png") - sharp).max() <= 1


def test_alpha_and_greyness_are_kept(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    result = degrade(tmp_path / "alpha.png", tmp_path / "grey.png", "-o", tmp_path / "out", "--scale", 2)
    assert result.exit_code == 0, result.stderr
    assert [Image.open(tmp_path / "out" / name).mode for name in ("alpha.png", "grey.png")] == ["RGBA", "L"]
    assert Image.open(tmp_path / "out" / "alpha.png").size == (30, 25)


def test_what_fails_is_one_line_each_and_the_others_are_written(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:300])
    Image.new("RGB", (20, 20)).save(photos / "small.png")
    result = degrade(photos, tmp_path / "missing", "-o", tmp_path / "out")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "missing: no such file or folder" in lines[0] and "broken.png: truncated or damaged" in lines[1]
    assert "small.png: a picture of 20x20 px is too small" in lines[2]
    assert result.stdout == f"2 degraded, 3 failed: {tmp_path / 'out'}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]


def test_the_list_names_every_preset_and_an_unknown_one_proposes_the_nearest(photos: Path, tmp_path: Path) -> None:
    result = degrade("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(PRESETS)
    result = degrade(photos, "-o", tmp_path / "out", "--preset", "bicubik")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --preset: no degradation is called 'bicubik'; did you mean 'bicubic'?")
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(photos: Path) -> None:
    result = degrade(photos, "-o", photos)
    assert result.exit_code == 2
    assert "is an input and would be overwritten" in result.stderr
