"""Nothing is lost unsaid: sub-folders, names that meet, what is passed over, what a finished run leaves."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL.PngImagePlugin import PngImageFile

from stablesr_kit.cli.jobs import LONGEST_NAME, Report, plan
from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.version import __version__
from tests.helpers.cli_runs import error_lines, pixels_of, stablesr
from tests.helpers.picture_files import as_pillow, noise


def put(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        as_pillow(noise(8, 9, seed=seed)).save(folder / name, "PNG")
    return folder


def results(inputs: list[Path], output: Path, companion: str | None = None) -> dict[str, str]:
    jobs = plan(inputs, output, companion, Report("done"))
    return {str(job.source): str(job.target.relative_to(output)) for job in jobs}


def test_sub_folders_are_mirrored_and_results_are_no_inputs(tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png", "2001/summer/b.JPG", "2001/c", "out/a.png")
    assert results([photos], photos / "out") == {
        str(photos / "2001/c"): "2001/c.png",
        str(photos / "2001/summer/b.JPG"): "2001/summer/b.png",
        str(photos / "a.png"): "a.png",
    }


def test_names_that_meet_are_told_apart_by_ending_folder_or_number(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "a.png", "b.jpg", "b.tif"), put(tmp_path / "two", "a.png", "x/a.png")
    other = put(tmp_path / "other" / "one", "a.png")
    names = results([one, two, other], tmp_path / "out")
    assert names[str(one / "b.jpg")] == "b_jpg.png"
    assert names[str(one / "b.tif")] == "b_tif.png"
    assert names[str(two / "x/a.png")] == "x/a.png"
    assert [names[str(folder / "a.png")] for folder in (one, two, other)] == [
        "a_png_1.png",
        "a_png_2.png",
        "a_png_3.png",
    ]
    assert results([one, two], tmp_path / "out")[str(two / "a.png")] == "two/a.png"
    assert len(set(names.values())) == len(names) == 6


@pytest.mark.parametrize(
    "pair", [("A.png", "a.png"), ("caf\u00e9.png", "cafe\u0301.png"), ("STRASSE.png", "straße.png")]
)
def test_names_that_are_one_on_other_systems_do_not_meet(pair: tuple[str, str], tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", *pair)
    if len(list(photos.iterdir())) < 2:
        pytest.skip("this system is one of them")
    names = results([photos], tmp_path / "out").values()
    assert len({name.casefold() for name in names}) == 2


def test_a_companion_meets_no_result(tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png", "a_compare.png")
    jobs = plan([photos], tmp_path / "out", "_compare", Report("done"))
    assert len({path for job in jobs for path in job.results}) == 4


def test_a_picture_given_twice_is_done_once(tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png")
    assert len(results([photos, photos / "a.png", photos / ".." / "photos" / "a.png"], tmp_path / "out")) == 1


@pytest.mark.parametrize("inputs", [("a.png", "b.png"), (".",)])
def test_several_pictures_and_the_name_of_a_file_are_a_usage_error(inputs: tuple[str, ...], tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png", "b.png")
    result = stablesr("restore", *(photos / name for name in inputs), "-o", tmp_path / "both.png")
    assert (result.exit_code, error_lines(result)) == (
        2,
        [f"error: -o {tmp_path / 'both.png'} names a file; several pictures need a folder"],
    )
    assert not (tmp_path / "both.png").exists()


def test_what_is_passed_over_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = put(tmp_path / "photos", "a.png", "deep/b.png")
    (photos / "notes.txt").touch()
    (photos / "deep" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    results([photos], tmp_path / "out")
    assert capsys.readouterr().err == (
        f"note: no pictures, passed over: {photos / 'deep' / 'clip.mp4'}, {photos / 'notes.txt'}\n"
    )


def test_a_name_too_long_for_its_result_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * (LONGEST_NAME - 4)
    photos = put(tmp_path / "photos", f"{long}.png", "a.png")
    report = Report("done")
    assert len(plan([photos], tmp_path / "out", None, report)) == 2
    assert len(plan([photos], tmp_path / "out", "_compare", report)) == 1
    assert report.failed == 1
    assert "the name of its result would be 263 bytes long, 255 at most; rename it" in capsys.readouterr().err


def test_the_longest_name_is_restored(model: Path, tmp_path: Path) -> None:
    name = "n" * (LONGEST_NAME - 4) + ".png"
    photos = put(tmp_path / "photos", name)
    result = stablesr("restore", photos, "-o", tmp_path / "out", "--model", model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_a_usage_error(seed: int, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png")
    result = stablesr("restore", photos, "-o", tmp_path / "out", "--seed", seed)
    assert (result.exit_code, error_lines(result)) == (
        2,
        [f"error: --seed {seed} must be of 64 bits, such as 0 to {2**64 - 1}"],
    )


def test_a_finished_run_leaves_results_that_know_how_they_were_made(model: Path, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png", "deep/b.png")
    out = tmp_path / "out"
    arguments = ("restore", photos, "-o", out, "--model", model, "--seed", 7, "--w", 0.25)
    assert stablesr(*arguments).exit_code == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == ["a.png", "deep", "deep/b.png"]
    made = read_provenance(out / "deep" / "b.png")
    assert made is not None
    expected = {"software": "stablesr-kit", "version": __version__, "model": model.name, "seed": 7, "w": 0.25}
    assert expected.items() <= made.items()
    assert isinstance(made["steps"], int)
    assert json.loads(PngImageFile(out / "a.png").text["stablesr"])["seed"] == 7
    again = stablesr(*arguments, "--resume")
    assert (again.exit_code, again.stdout) == (0, "0 restored, 2 already there\n")
    other = stablesr(*arguments[:-1], 0.5, "--resume")
    assert other.exit_code == 2
    assert error_lines(other)[0].endswith(
        "was made with w 0.25 (now 0.5); give the same settings, or start again without --resume"
    )


@pytest.mark.parametrize("name", ["out.jpg", "out.tif", "out.webp"])
def test_finished_pictures_of_every_format_are_known_again_until_they_are_damaged(
    name: str, model: Path, tmp_path: Path
) -> None:
    put(tmp_path, "in.png")
    arguments = ("restore", tmp_path / "in.png", "-o", tmp_path / name, "--model", model, "--resume")
    assert stablesr(*arguments).stdout == f"1 restored: {tmp_path / name}\n"
    whole = (tmp_path / name).read_bytes()
    assert stablesr(*arguments).stdout == "0 restored, 1 already there\n"
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert stablesr(*arguments).stdout == f"1 restored: {tmp_path / name}\n"
    assert (tmp_path / name).read_bytes() == whole


def test_without_provenance_a_result_says_nothing_and_a_stopped_run_is_still_continued(
    model: Path, tmp_path: Path
) -> None:
    photos = put(tmp_path / "photos", "a.png", "b.png")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    out = tmp_path / "out"
    arguments = ("restore", photos, "-o", out, "--model", model, "--no-provenance")
    assert stablesr(*arguments).exit_code == 1
    assert b"stablesr" not in (out / "a.png").read_bytes()
    assert read_provenance(out / "a.png") is None
    assert (out / ".stablesr").is_dir()
    put(photos, "broken.png")
    again = stablesr(*arguments, "--resume")
    assert (again.exit_code, again.stdout) == (0, f"1 restored, 2 already there: {out / 'broken.png'}\n")
    assert not (out / ".stablesr").exists()


def test_a_grey_picture_in_a_colour_file_comes_back_grey(model: Path, tmp_path: Path) -> None:
    grey = noise(24, 24, 1).repeat(3, axis=2)
    as_pillow(grey).save(tmp_path / "in.jpg", quality=90)
    as_pillow(grey[..., 0]).convert("P").save(tmp_path / "in.gif")
    for name in ("in.jpg", "in.gif"):
        result = stablesr(
            "restore", tmp_path / name, "-o", tmp_path / "out.png", "--model", model, "--color-fix", "none"
        )
        assert result.exit_code == 0
        pixels = pixels_of(tmp_path / "out.png")
        assert pixels.shape == (96, 96, 3)
        assert np.array_equal(pixels[..., 0], pixels[..., 1])
        assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_what_a_format_cannot_hold_is_said_in_one_line(model: Path, tmp_path: Path) -> None:
    image = as_pillow(noise(8, 9))
    image.save(tmp_path / "in.jpg", comment=b"a comment")
    result = stablesr("restore", tmp_path / "in.jpg", "-o", tmp_path / "out.webp", "--model", model)
    assert result.exit_code == 0
    assert error_lines(result) == [f"note: {tmp_path / 'in.jpg'}: WEBP cannot hold and leaves out: the comment"]


def test_results_are_told_from_the_folder_that_all_lie_in(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("x", "y"):
        (photos / name).mkdir(parents=True)
        as_pillow(noise(48, 48)).save(photos / name / f"{name}.png")
    result = stablesr("degrade", photos, "-o", tmp_path / "out")
    assert result.stdout == f"2 degraded: {tmp_path / 'out'}\n"
    assert read_picture(tmp_path / "out" / "x" / "x.png").height == 48


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "a.png")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    result = stablesr("restore", photos, "-o", tmp_path / "locked", "--model", "no/such/model")
    assert result.exit_code == 1
    assert "the folder is not writable (Permission denied); choose another -o" in result.stderr
