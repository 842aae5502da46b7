"""The command line from end to end, with a tiny random model: exit statuses, one-line errors, whole files."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stablesr_kit import StableSRPipeline
from stablesr_kit.cli.restorer import load_pipeline
from stablesr_kit.pipelines.loading import carries_empty_prompt
from tests.helpers.cli_runs import error_lines, stablesr
from tests.helpers.tiny import tiny_pipeline


def names_in(folder: Path) -> list[str]:
    """What a user sees there: the journal is hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".stablesr")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with pictures of four kinds, a broken one, and files that are no pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "colour.jpg")
    Image.fromarray(pixels).save(folder / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.tif")
    (folder / "broken.png").write_bytes((folder / "alpha.png").read_bytes()[:200])
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    return folder


def test_help_is_instant_because_torch_is_not_imported() -> None:
    program = "import sys; from stablesr_kit.cli import main; main()"
    for arguments in (["--help"], ["restore", "--help"], ["--version"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 1, arguments
        assert result.stdout
        assert result.stderr == ""
    probe = "import sys, stablesr_kit.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_one_picture_to_a_named_file(model: Path, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "restored.webp"
    result = stablesr("restore", photos / "alpha.png", "-o", target, "--model", model, "--scale", 3)
    assert error_lines(result) == []
    assert result.exit_code == 0
    assert result.stdout == f"1 restored: {target}\n"
    with Image.open(target) as restored:
        assert (restored.format, restored.mode, restored.size) == ("WEBP", "RGBA", (39, 30))
    assert names_in(target.parent) == ["restored.webp"]


def test_the_text_encoder_stays_on_disk_where_no_prompt_needs_it(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    for has_prompt in (False, True):
        loaded = load_pipeline(str(tmp_path), torch.device("cpu"), torch.float32, has_prompt)
        assert (loaded.text_encoder is not None, loaded.tokenizer is not None) == (has_prompt, has_prompt)
    config = tmp_path / "adapter" / "config.json"
    config.write_text(config.read_text().replace('"prompt_length": 12', '"prompt_length": 0'))
    assert not carries_empty_prompt(tmp_path)


def test_a_folder_with_a_broken_picture_and_then_resume(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = stablesr("restore", photos, tmp_path / "missing.png", "-o", out, "--model", model, "--compare")
    assert result.exit_code == 1
    lines = error_lines(result)
    assert lines[0] == f"error: {tmp_path / 'missing.png'}: no such file or folder; check the name"
    assert lines[1] == f"note: no pictures, passed over: {photos / '.hidden.png'}, {photos / 'notes.txt'}"
    assert len(lines) == 3
    assert lines[2].startswith(f"error: {photos / 'broken.png'}: truncated or damaged")
    assert result.stdout == f"4 restored, 2 failed: {out}\n"
    names = ["alpha", "colour", "deep", "grey"]
    assert names_in(out) == sorted(f"{n}{kind}.png" for n in names for kind in ("", "_compare"))
    modes = [Image.open(out / f"{name}.png").mode for name in names]
    assert modes == ["RGBA", "RGB", "I;16", "L"]
    assert {Image.open(out / f"{name}.png").size for name in names} == {(52, 40)}
    assert Image.open(out / "grey_compare.png").size == (105, 40)

    (photos / "broken.png").unlink()
    (out / "grey_compare.png").unlink()
    before = {name: (out / name).stat().st_mtime_ns for name in names_in(out)}
    again = stablesr("restore", photos, "-o", out, "--model", model, "--compare", "--resume")
    assert len(error_lines(again)) == 1  # what is passed over
    assert again.exit_code == 0
    assert again.stdout == f"1 restored, 3 already there: {out / 'grey.png'}\n"
    changed = {name for name in names_in(out) if before.get(name) != (out / name).stat().st_mtime_ns}
    assert changed == {"grey.png", "grey_compare.png"}


def test_what_is_done_is_known_by_its_content_and_not_by_its_name(model: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("restore", photos / "colour.jpg", "-o", tmp_path / "out.png", "--model", model, "--resume")
    (tmp_path / "out.png").write_text("by somebody else")
    assert stablesr(*arguments).stdout == f"1 restored: {tmp_path / 'out.png'}\n"
    whole = (tmp_path / "out.png").read_bytes()
    assert stablesr(*arguments).stdout == "0 restored, 1 already there\n"

    (tmp_path / "out.png").write_bytes(whole[:-20])
    assert stablesr(*arguments).stdout == f"1 restored: {tmp_path / 'out.png'}\n"
    assert (tmp_path / "out.png").read_bytes() == whole
    Image.open(photos / "grey.png").convert("RGB").save(photos / "colour.jpg")
    assert stablesr(*arguments).stdout == f"1 restored: {tmp_path / 'out.png'}\n"
    assert (tmp_path / "out.png").read_bytes() != whole


def test_nothing_left_to_do_loads_no_model(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("restore", photos / "colour.jpg", "-o", tmp_path / "out.png", "--model", model)
    assert stablesr(*arguments).exit_code == 0
    monkeypatch.delattr(StableSRPipeline, "from_pretrained")
    assert stablesr(*arguments, "--resume").stdout == "0 restored, 1 already there\n"


def test_resuming_with_other_settings_is_refused_with_what_differs(model: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("restore", photos / "colour.jpg", "-o", tmp_path / "out.png", "--model", model)
    assert stablesr(*arguments).exit_code == 0
    result = stablesr(*arguments, "--resume", "--w", 0.25, "--steps", 1)
    assert result.exit_code == 2
    assert error_lines(result) == [
        f"error: {tmp_path / 'out.png'}: was made with w 0.5 (now 0.25), num_inference_steps None (now 1); "
        "give the same settings, or start again without --resume"
    ]
    assert stablesr(*arguments, "--w", 0.25, "--steps", 1).exit_code == 0


def test_a_seed_gives_one_result_whatever_came_before(model: Path, photos: Path, tmp_path: Path) -> None:
    alone, together, other = (tmp_path / name for name in ("alone", "together", "other"))
    (photos / "broken.png").unlink()
    stablesr("restore", photos / "grey.png", "-o", alone, "--model", model)
    stablesr("restore", photos, "-o", together, "--model", model)
    stablesr("restore", photos / "grey.png", "-o", other, "--model", model, "--seed", 1)
    pixels = [np.asarray(Image.open(folder / "grey.png")) for folder in (alone, together, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--w", -0.5), "--w -0.5 must be a number from 0 .* above 1 extrapolates"),
        (("--w", "nan"), "--w nan must be a number"),
        (("--steps", 0), "--steps 0 must be at least 1"),
        (("--scale", 0), "--scale 0.0 must be a positive number"),
        (("--scale", "inf"), "--scale inf must be"),
        (("--guidance-scale", "nan"), "--guidance-scale nan must be"),
        (("--start", "middle"), "--start 'middle' is not known; give lq, noise or a timestep"),
        (("--tile", "large"), "--tile 'large' is not known; give auto, none or a number of pixels"),
        (("--tile", 256, "--tile-overlap", 256), "--tile-overlap 256 must be from 0 to less than --tile 256"),
        (("--max-memory", "much"), "--max-memory 'much' is not a size; give one such as 6GB or 500MB"),
        (("--start", -1), "--start '-1' is not known"),
        (("--device", "tpu"), "--device 'tpu' is not known; give auto, cpu, cuda"),
        (("--device", "cuda:"), "--device 'cuda:' is not known"),
        (("--device", "cpu:1"), "--device cpu:1 is not available here"),
        (("--model", "no/such/model"), "'no/such/model' is neither an embedded model"),
        (("--model", "{photos}"), "holds no model_index.json"),
        (("--prompt", "a house"), "a prompt needs a text encoder"),
        (("-o", "out.bmp"), r"out\.bmp: suffix '\.bmp' is not supported; use one of \.png"),
        (("-o", "{photos}/grey.png"), "is an input and would be overwritten"),
        (("-o", "{photos}"), "grey.png is an input and would be overwritten"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: tuple[object, ...], message: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    given = [str(argument).format(photos=photos) for argument in arguments]
    defaults = [("-o", tmp_path / "out.png"), ("--model", model)]
    missing = [
        value for option, pair in ((pair[0], pair) for pair in defaults) if option not in given for value in pair
    ]
    result = stablesr("restore", photos / "grey.png", *given, *missing)
    lines = error_lines(result)
    assert result.exit_code == 2, lines
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out.png").exists()


def test_several_pictures_need_a_folder_and_different_names(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.png").touch()
    result = stablesr("restore", photos, "-o", tmp_path / "taken.png", "--model", model)
    assert (result.exit_code, len(error_lines(result))) == (2, 1)
    assert "is a file; several pictures need a folder" in result.stderr

    (tmp_path / "more").mkdir()
    for path in (photos / "grey.png", photos / "colour.jpg"):
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    result = stablesr("restore", photos / "grey.png", tmp_path / "more", "-o", tmp_path / "two", "--model", model)
    assert result.exit_code == 0
    written = sorted(str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").rglob("*.png"))
    assert written == ["colour.png", "more/grey.png", "photos/grey.png"]

    Image.open(photos / "colour.jpg").save(photos / "colour.tif")
    pictures = (photos / "colour.jpg", photos / "colour.tif")
    result = stablesr("restore", *pictures, "-o", tmp_path / "out", "--model", model)
    assert result.exit_code == 0
    assert names_in(tmp_path / "out") == ["colour_jpg.png", "colour_tif.png"]


def test_places_that_cannot_be_written_show_before_any_work(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = stablesr("restore", photos / "grey.png", "-o", tmp_path / "file" / "out.png", "--model", "no/such/model")
    assert result.exit_code == 1
    assert error_lines(result) == [
        f"error: {tmp_path / 'file'}: the folder cannot be made (File exists); choose another -o"
    ]


def test_what_only_one_picture_cannot_have_fails_that_picture(model: Path, photos: Path, tmp_path: Path) -> None:
    result = stablesr("restore", photos / "alpha.png", "-o", tmp_path / "out.jpg", "--model", model)
    assert result.exit_code == 1
    assert error_lines(result) == [
        f"error: {tmp_path / 'out.jpg'}: JPEG cannot hold the transparency of this picture; use .png, .webp or .tif"
    ]
    assert result.stdout == "0 restored, 1 failed\n"

    Image.new("RGB", (4000, 10)).save(photos / "long.png")
    pictures = (photos / "long.png", photos / "grey.png")
    result = stablesr("restore", *pictures, "-o", tmp_path / "out", "--model", model, "--scale", 100_000)
    assert result.exit_code == 1
    lines = error_lines(result)
    assert [line.partition("png: ")[2] for line in lines] == [
        f"the result would have {millions} million pixels, more than the limit of 4,295 million; give a smaller --scale"
        for millions in ("400,000,000", "1,300,000")
    ]


def test_a_damaged_model_is_one_line(model: Path, photos: Path, tmp_path: Path) -> None:
    damages = {"unet": "unet/diffusion_pytorch_model.safetensors", "index": "model_index.json"}
    for name, file in damages.items():
        copy = tmp_path / name
        shutil.copytree(model, copy)
        (copy / file).write_bytes((copy / file).read_bytes()[:100])
        result = stablesr("restore", photos / "grey.png", "-o", tmp_path / "out", "--model", copy)
        assert result.exit_code == 1
        lines = error_lines(result)
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {copy}: the model cannot be loaded (")


def test_a_fresh_process_restores(model: Path, photos: Path, tmp_path: Path) -> None:
    program = "from stablesr_kit.cli import main; main()"
    command = [sys.executable, "-c", program, "restore", photos / "grey.png", "-o", "out.png", "--model", model]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "1 restored: out.png\n", "")


def test_a_folder_without_pictures_fails(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = stablesr("restore", tmp_path / "empty", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert len(error_lines(result)) == 1
    assert result.stdout == "0 restored, 1 failed\n"
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_whole_files_and_says_so(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written = []

    def interrupt_after_the_first_result(descriptor: int) -> None:
        if (out / "alpha.png").exists():
            written.append(descriptor)
        if len(written) == 2:  # the first is the result's line in the journal
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt_after_the_first_result)
    (photos / "broken.png").unlink()
    result = stablesr("restore", photos, "-o", out, "--model", model)
    assert result.exit_code == 130
    assert error_lines(result)[1:] == [
        f"interrupted: 1 restored: {out / 'alpha.png'}; nothing is half-written, --resume continues"
    ]
    assert names_in(out) == ["alpha.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--start", "noise", "--color-fix", "none", "--w", 0),
        ("--start", 500, "--steps", 4, "--color-fix", "adain", "--w", 1.5),
        ("--dtype", "bfloat16", "--device", "cpu", "--steps", 1),
    ],
)
def test_options_reach_the_model(arguments: tuple[object, ...], model: Path, photos: Path, tmp_path: Path) -> None:
    default = stablesr("restore", photos / "colour.jpg", "-o", tmp_path / "default.png", "--model", model)
    chosen = stablesr("restore", photos / "colour.jpg", "-o", tmp_path / "chosen.png", "--model", model, *arguments)
    assert (default.exit_code, chosen.exit_code) == (0, 0), error_lines(chosen)
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("default.png", "chosen.png")]
    assert not np.array_equal(*pixels)


def test_doctor_reports_versions_and_whether_the_embedded_model_loads() -> None:
    result = stablesr("doctor")
    for subject in ("python", "torch", "diffusers", "xformers", "cpu", "memory", "disk"):
        assert re.search(rf"^{subject} +\S", result.stdout, re.MULTILINE), subject
    assert re.search(r"^model +mini: [0-9.]+ M parameters .*, loaded in", result.stdout, re.MULTILINE), result.stdout
    assert result.exit_code == 0


def test_a_model_of_one_variant_alone_is_taken_and_several_are_named(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    pipeline = StableSRPipeline.from_pretrained(model)
    pipeline.save_pretrained(folder, variant="fp16")
    out = tmp_path / "out.png"
    result = stablesr("restore", photos / "colour.jpg", "-o", out, "--model", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    pipeline.save_pretrained(folder, variant="bf16")
    result = stablesr("restore", photos / "colour.jpg", "-o", out, "--model", folder)
    assert result.exit_code == 1
    assert error_lines(result) == [
        f"error: {folder}: holds its weights as bf16, fp16 and none without such a name; "
        "keep one of them in a folder, or give variant= in Python"
    ]
