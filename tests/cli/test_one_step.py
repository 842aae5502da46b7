"""`stablesr convert` and `stablesr restore` with a one-step restorer in its released layout."""

from pathlib import Path

import pytest
from PIL import Image

from stablesr_kit import OneStepPipeline
from tests.helpers.cli_runs import error_lines, pixels_of, stablesr
from tests.helpers.tiny import seeded, tiny_pipeline

OSEDIFF = Path(__file__).parents[1] / "goldens" / "onestep" / "osediff"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_step") / "osediff"
    result = stablesr("convert", OSEDIFF / "osediff.pkl", "--base", OSEDIFF / "base", "-o", folder)
    assert result.exit_code == 0 and error_lines(result) == []
    licence, converted = result.stdout.splitlines()[-2:]
    assert licence.startswith("licence: OSEDiff") and "Apache-2.0" in licence and "RAIL" in licence
    assert converted == f"converted: {folder}"
    assert (folder / "LICENCE.txt").read_text() == licence.removeprefix("licence: ") + "\n"
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((13, 10)).save(path)
    return path


def test_restore_runs_what_the_folder_holds(model: Path, picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "restored.png"
    options = ("--model", model, "--dtype", "float32", "--scale", 3.5, "--prompt", "cat, grass, ,")
    result = stablesr("restore", picture, "-o", target, *options)
    assert result.exit_code == 0 and error_lines(result) == []
    pipeline = OneStepPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(Image.open(picture), prompt="cat, grass, ,", scale=3.5, generator=seeded(0)).images[0]
    with Image.open(target) as restored:
        assert restored.size == image.size == (46, 35)
    assert abs(pixels_of(target).astype(int) - pixels_of(save(image, tmp_path))).max() <= 1
    stablesr("restore", picture, "-o", target, "--model", model, "--scale", 3.5)
    assert abs(pixels_of(target).astype(int) - pixels_of(save(image, tmp_path))).max() > 1


def save(image: Image.Image, folder: Path) -> Path:
    image.save(folder / "expected.png")
    return folder / "expected.png"


def test_options_of_the_other_kind_are_refused_before_anything_is_done(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    tiny_pipeline(with_text=False).save_pretrained(tmp_path / "stablesr")
    for folder, option, value, message in (
        (model, "--w", 0.5, "belongs to StableSR"),
        (model, "--start", "noise", "belongs to StableSR"),
        (model, "--lambda-sem", 0.5, "strengths of PiSA-SR"),
        (tmp_path / "stablesr", "--lambda-pix", 1, "belongs to PiSA-SR"),
    ):
        result = stablesr("restore", picture, "-o", tmp_path / "no.png", "--model", folder, option, value)
        assert result.exit_code == 2 and message in result.stderr and len(error_lines(result)) == 1
    assert not (tmp_path / "no.png").exists()


def test_convert_says_what_is_missing_or_too_much(tmp_path: Path) -> None:
    weights = OSEDIFF / "osediff.pkl"
    for arguments, message in (
        ((), "give its base, Stable Diffusion 2.1"),
        (("--base", OSEDIFF / "base", "--cfw", weights), "--cfw belongs to StableSR"),
        (("--base", OSEDIFF / "base", "--prediction-type", "epsilon"), "--prediction-type belongs to StableSR"),
    ):
        result = stablesr("convert", weights, *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr and len(error_lines(result)) == 1
    assert not (tmp_path / "out").exists()
