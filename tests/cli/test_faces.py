"""`stablesr faces` and `stablesr restore --face` from end to end: every mode, photos of every kind, bad input."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from typer.testing import Result

from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.imaging.resizing import resize_bicubic
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
from stablesr_kit.spaces import image_to_pixels, pixels_to_image
from tests.helpers.cli_runs import pixels_of, stablesr
from tests.helpers.tiny import TINY_FACE_PX, tiny_codeformer, tiny_pipeline

PROGRAMS = Path(__file__).parents[2] / "pipelines"
# Eyes, nose and corners of the mouth in `photo`, by eye.
LANDMARKS = [[44, 47], [61, 46], [54, 58], [47, 67], [61, 66]]


def faces(*arguments: object) -> Result:
    return stablesr("faces", *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CodeFormer of random weights: what it restores is nobody."""
    folder = tmp_path_factory.mktemp("faces")
    CodeFormerPipeline(tiny_codeformer()).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A file with one face, 128 pixels on each side."""
    path = tmp_path / "photo.png"
    Image.fromarray(data.astronaut()[20:276, 120:376]).resize((128, 128), Image.Resampling.BOX).save(path)
    return path


@pytest.fixture
def landmarks(tmp_path: Path) -> Path:
    return write_json(tmp_path / "given.json", {"photo.png": [{"landmarks": LANDMARKS}]})


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def enlarged(file: Path, times: int = 2) -> np.ndarray:
    """The pixels of `--background none`."""
    image = pixels_to_image(pixels_of(file))
    return image_to_pixels(resize_bicubic(image, times * image.shape[2], times * image.shape[3]))[0]


def test_a_face_that_becomes_somebody_else_is_left_alone_and_the_line_says_so(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    result = faces(photo, "-o", out, "--model", model, "--background", "none")
    assert (result.exit_code, result.stderr) == (0, "")
    line, summary = result.stdout.splitlines()
    assert line.startswith(f"{photo}: face 1 of 1 at (")
    assert "found by mtcnn: left alone, identity distance " in line
    assert summary == f"1 done: {out}"
    assert np.array_equal(pixels_of(out), enlarged(photo))


def test_the_box_is_drawn_around_a_face_that_is_restored_and_the_crops_are_written(
    model: Path, photo: Path, landmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    arguments = (photo, "-o", out, "--model", model, "--background", "none", "--given", landmarks, "--w", 0.4)
    result = faces(*arguments, "--max-identity-distance", "inf", "--draw-box", "--save-crops")
    assert result.exit_code == 0, result.stderr
    assert f"{photo}: face 1 of 1 at (44, 46) to (61, 67), given: refined with w 0.4" in result.stdout
    changed = (pixels_of(out) != enlarged(photo)).any(-1)
    assert changed[80:130, 90:120].any()
    assert not changed[:, 230:].any()
    assert (pixels_of(out) == (0, 255, 0)).all(-1).any()
    before, after = (pixels_of(tmp_path / "out_faces" / f"001_{name}.png") for name in ("lq", "restored"))
    assert before.shape == after.shape == (TINY_FACE_PX, TINY_FACE_PX, 3)
    assert (before != after).any()


def test_only_the_chosen_of_several_faces_is_restored(model: Path, photo: Path, tmp_path: Path) -> None:
    one = Image.open(photo)
    pair = Image.new("RGB", (368, 128))
    pair.paste(one, (80, 0))
    pair.paste(one.resize((160, 160)), (208, -16))
    pair.save(tmp_path / "pair.png")
    told = {}
    for option in ((), ("--only-center",), ("--only-largest",), ("--min-eye-distance", 40)):
        out = tmp_path / "out.png"
        result = faces(tmp_path / "pair.png", "-o", out, "--model", model, "--background", "none", *option)
        assert result.exit_code == 0, result.stderr
        told[" ".join(map(str, option))] = [line.partition(" at ")[2] for line in result.stdout.splitlines()[:-1]]
    assert len(told[""]) == 2
    (central,), (largest,) = told["--only-center"], told["--only-largest"]
    assert {central.split(",")[0], largest.split(",")[0]} == {line.split(",")[0] for line in told[""]}
    assert int(central[1:].split(",")[0]) < 208 < int(largest[1:].split(",")[0])
    assert told["--min-eye-distance 40"] == [""]


def test_a_photo_without_a_face_is_enlarged_and_the_line_says_0_faces(model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(plain)
    out = tmp_path / "out.png"
    result = faces(plain, "-o", out, "--model", model, "--background", "none", "--upscale", 3)
    assert result.exit_code == 0
    said = f"{plain}: 0 faces with eyes more than 5 pixels apart (mtcnn); no face is restored\n"
    assert result.stdout == f"{said}1 done: {out}\n"
    assert np.array_equal(pixels_of(out), enlarged(plain, 3))


def test_the_background_is_enlarged_by_stablesr(model: Path, photo: Path, tmp_path: Path) -> None:
    background = tmp_path / "stablesr"
    tiny_pipeline(with_text=False).save_pretrained(background)
    small = tmp_path / "small.png"
    Image.open(photo).crop((40, 40, 56, 52)).save(small)
    result = faces(small, "-o", tmp_path / "out.png", "--model", model, "--background", background)
    assert result.exit_code == 0, result.stderr
    assert pixels_of(tmp_path / "out.png").shape == (24, 32, 3)
    assert (pixels_of(tmp_path / "out.png") != enlarged(small)).any()
    assert np.ptp(pixels_of(tmp_path / "out.png").astype(int), axis=-1).max() > 0
    Image.open(small).convert("L").convert("RGB").save(small)
    faces(small, "-o", tmp_path / "out.png", "--model", model, "--background", background)
    assert np.ptp(pixels_of(tmp_path / "out.png"), axis=-1).max() == 0


def test_a_large_face_is_enlarged_by_stablesr_and_a_small_one_is_not(
    model: Path, photo: Path, landmarks: Path, tmp_path: Path
) -> None:
    upsampler = tmp_path / "stablesr"
    tiny_pipeline(with_text=False).save_pretrained(upsampler)
    arguments = ("--model", model, "--background", "none", "--given", landmarks, "--max-identity-distance", "inf")
    for upscale, is_larger in ((1, True), (0.2, False)):
        for name, option in (("plain", ()), ("enlarged", ("--face-upsampler", upsampler))):
            result = faces(photo, "-o", tmp_path / f"{name}.png", *arguments, "--upscale", upscale, *option)
            assert result.exit_code == 0, result.stderr
        differs = (pixels_of(tmp_path / "plain.png") != pixels_of(tmp_path / "enlarged.png")).any(-1)
        assert differs.any() == is_larger
        assert not differs[0].any()
    made = read_provenance(tmp_path / "enlarged.png")
    assert made is not None
    assert made["face_upsampler"] == str(upsampler)


def test_a_face_of_20_pixels_is_found(model: Path, photo: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.open(photo).resize((72, 72), Image.Resampling.BOX).save(small)
    result = faces(small, "-o", tmp_path / "out.png", "--model", model, "--background", "none")
    assert f"{small}: face 1 of 1" in result.stdout


def test_photos_of_every_kind_keep_what_belongs_to_them(model: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.open(photo)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    see_through = image.copy()
    see_through.putalpha(Image.linear_gradient("L").resize(image.size))
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(deep).save(folder / "deep.png")
    see_through.save(folder / "alpha.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    out = tmp_path / "out"
    result = faces(folder, "-o", out, "--model", model, "--background", "none", "--max-identity-distance", "inf")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("face 1 of 1") == 4
    for name, mode in (("grey", "L"), ("deep", "I;16"), ("alpha", "RGBA"), ("cmyk", "RGB")):
        with Image.open(out / f"{name}.png") as written:
            assert (written.size, written.mode) == ((256, 256), mode)


@pytest.mark.parametrize("mode", ["whole", "aligned"])
def test_a_result_says_how_it_was_made_unless_that_is_unwanted(
    mode: str, model: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    arguments = [photo, "-o", out, "--model", model, "--mode", mode, "--w", 0.3]
    arguments += ["--background", "none"] if mode == "whole" else []
    assert faces(*arguments).exit_code == 0
    made = read_provenance(out)
    assert made is not None
    assert {"command": "faces", "mode": mode, "model": model.name, "w": 0.3}.items() <= made.items()
    assert faces(*arguments, "--no-provenance").exit_code == 0
    assert read_provenance(out) is None


def test_an_aligned_face_is_restored_as_the_pipeline_does_it(model: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = faces(photo, "-o", out, "--model", model, "--mode", "aligned", "--w", 0.2)
    assert result.exit_code == 0, result.stderr
    line, summary = result.stdout.splitlines()
    assert line.startswith(f"{photo}: aligned face, restored with w 0.2, identity distance 0.")
    assert summary == f"1 done: {out}"
    pipeline = CodeFormerPipeline.from_pretrained(model)
    expected = pipeline([Image.open(photo)], w=0.2).images[0]
    assert np.array_equal(pixels_of(out), np.asarray(expected))
    faces(photo, "-o", out, "--model", model, "--mode", "aligned", "--w", 1)
    assert (pixels_of(out) != np.asarray(expected)).any()


def test_inpainting_fills_the_white_pixels_and_leaves_the_others(model: Path, photo: Path, tmp_path: Path) -> None:
    pixels = pixels_of(photo)[32:96, 32:96].clip(0, 254)
    hole = np.zeros(pixels.shape[:2], bool)
    hole[10:30, 20:40] = True
    Image.fromarray(np.where(hole[..., None], np.uint8(255), pixels)).save(tmp_path / "holed.png")
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    for name, option in (("holed", ()), ("whole", ("--mask", tmp_path / "mask.png"))):
        result = faces(
            tmp_path / f"{name}.png", "-o", tmp_path / "out.png", "--model", model, "--mode", "inpaint", *option
        )
        assert result.exit_code == 0, result.stderr
        assert f"{name}.png: aligned face, 10% filled in with w 1\n" in result.stdout
        filled = pixels_of(tmp_path / "out.png")
        assert np.array_equal(filled[~hole], pixels[~hole])
        assert (filled[hole] != 255).any()


@pytest.mark.parametrize(
    ("side", "value", "said"), [(40, 0, "give a mask of the face's size"), (128, 255, "mask 0 is all white")]
)
def test_masks_that_fit_no_face_are_refused_in_one_line(
    model: Path, photo: Path, tmp_path: Path, side: int, value: int, said: str
) -> None:
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("L", (side, side), value).save(mask)
    result = faces(photo, "-o", out, "--model", model, "--mode", "inpaint", "--mask", mask)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {photo}: mask 0 is ")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert not out.exists()


def test_a_grey_face_gets_colours(model: Path, photo: Path, tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.open(photo).convert("L").save(grey)
    result = faces(grey, "-o", tmp_path / "out.png", "--model", model, "--mode", "colorize")
    assert result.exit_code == 0, result.stderr
    assert f"{grey}: aligned face, coloured with w 0, identity distance " in result.stdout
    assert np.ptp(pixels_of(tmp_path / "out.png").astype(int), axis=-1).max() > 0


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "0 faces given; no face is restored"),
        ([{"box": [2, 90, 32, 126]}], "face 1 of 1 at (2, 90) to (32, 126), given, taken as upright: "),
        ([{"box": [31, 22, 73, 76]}], "face 1 of 1 at (31, 22) to (73, 76), given: "),
    ],
)
def test_the_line_says_what_was_made_of_faces_given(
    model: Path, photo: Path, tmp_path: Path, entries: list[object], said: str
) -> None:
    given = write_json(tmp_path / "given.json", {"photo.png": entries})
    out = tmp_path / "out.png"
    result = faces(photo, "-o", out, "--model", model, "--background", "none", "--given", given)
    assert result.exit_code == 0, result.stderr
    assert f"{photo}: {said}" in result.stdout


@pytest.mark.parametrize("upscale", ["1000", "1e200"])
def test_results_that_no_memory_holds_are_refused_in_one_line(
    model: Path, photo: Path, tmp_path: Path, upscale: str
) -> None:
    out = tmp_path / "out.png"
    for command in (("faces", "--background", "none", "--upscale"), ("restore", "--scale")):
        named = ("--model", model) if command[0] == "faces" else ()
        result = stablesr(command[0], photo, "-o", out, *named, *command[1:], upscale)
        assert (result.exit_code, out.exists()) == (1, False)
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {photo}: the result would have ")


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ({"photo.png": [{"landmarks": [[1, 2]]}]}, 1, "is no face; expected"),
        ({"photo.png": [{"landmarks": [[900 + x, y] for x, y in LANDMARKS]}]}, 1, "lies outside the picture"),
        ({"photo.png": [{"landmarks": [[30, 30]] * 5}]}, 1, "a given face of 0 pixels"),
        ({"other.png": []}, 2, "other.png: no input of that name"),
    ],
)
def test_faces_given_wrongly_are_refused_in_one_line(
    model: Path, photo: Path, tmp_path: Path, content: object, status: int, said: str
) -> None:
    given = write_json(tmp_path / "given.json", content)
    out = tmp_path / "out.png"
    result = faces(photo, "-o", out, "--model", model, "--background", "none", "--given", given)
    assert result.exit_code == status
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert not out.exists()


def test_a_broken_photo_among_others_is_one_line_and_the_others_are_written(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:500])
    out = tmp_path / "out"
    result = faces(photo, tmp_path / "broken.png", "-o", out, "--model", model, "--background", "none")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'broken.png'}: ")
    assert [path.name for path in out.iterdir()] == ["photo.png"]


def damaged(folder: Path, weights: dict[str, torch.Tensor] | None, **config: object) -> None:
    """Changes the network in a pipeline's folder; weights: None removes them."""
    config_file, weight_file = (folder / "codeformer" / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    write_json(config_file, json.loads(config_file.read_text()) | config)
    weight_file.unlink()
    if weights is not None:
        save_file(weights, weight_file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", ["pickled", "cut", "a tensor less", "another width", "no width"])
def test_a_damaged_face_model_is_one_line(model: Path, photo: Path, tmp_path: Path, damage: str) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out.png"
    shutil.copytree(model, copy)
    weights = load_file(copy / "codeformer" / SAFETENSORS_WEIGHTS_NAME)
    match damage:
        case "pickled":
            damaged(copy, None)
            torch.save(weights, copy / "codeformer" / "diffusion_pytorch_model.bin")
        case "cut":
            (copy / "codeformer" / SAFETENSORS_WEIGHTS_NAME).write_bytes(b"cut")
        case "a tensor less":
            damaged(copy, {name: tensor for name, tensor in weights.items() if name != "positions"})
        case "another width":
            damaged(copy, weights, dim=32)
        case "no width":
            damaged(copy, weights, dim="wide")
    result = faces(photo, "-o", out, "--model", copy, "--background", "none")
    assert (result.exit_code, out.exists()) == (1, False)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {copy}: the model cannot be loaded (")


def test_a_face_model_without_its_weights_is_one_line_in_a_process_of_its_own(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    """diffusers logs to the stderr that there was when it was imported."""
    shutil.copytree(model, tmp_path / "copy")
    damaged(tmp_path / "copy", None)
    command = [sys.executable, "-m", "stablesr_kit.cli", "faces", photo, "-o", "out.png", "--model", "copy"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: copy: the model cannot be loaded (Error no file named diffusion_pytorch_model")


def test_a_face_model_that_computes_no_numbers_is_one_line_for_each_photo(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out.png"
    shutil.copytree(model, copy)
    weights = load_file(copy / "codeformer" / SAFETENSORS_WEIGHTS_NAME)
    damaged(copy, {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()})
    for options in (("--mode", "aligned"), ("--background", "none", "--max-identity-distance", "inf")):
        result = faces(photo, "-o", out, "--model", copy, *options)
        assert (result.exit_code, out.exists()) == (1, False)
        assert result.stderr.startswith(f"error: {photo}: the restored faces are not finite")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "aligned", "--only-center"), "--only-center is for --mode whole, not aligned"),
        (("--mask", "mask.png"), "--mask is for --mode inpaint, not whole"),
        (("--only-center", "--only-largest"), "exclude each other"),
        (("--upscale", "0"), "--upscale 0.0 must be a positive number"),
        (("--w", "1.5"), "--w 1.5 must be a number from 0 (quality) to 1 (fidelity)"),
        (("--background", "nowhere"), "--face-upsampler nowhere: no such file or folder"),
        (("--face-upsampler", "nowhere", "--background", "none"), "--face-upsampler nowhere: no such file or folder"),
        (("--face-upsampler", "none"), "--face-upsampler none: leave the option out"),
        (("--model", "/nowhere/at/all"), "'/nowhere/at/all' is neither"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    model: Path, photo: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = faces(photo, "-o", tmp_path / "out.png", "--model", model, *options)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


def test_the_face_model_of_the_package_is_taken_where_none_is_named(photo: Path, tmp_path: Path) -> None:
    for i, named in enumerate(((), ("--model", "mini"))):
        assert faces(photo, "-o", tmp_path / f"{i}.png", "--background", "none", *named).exit_code == 0
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert not np.array_equal(pixels_of(tmp_path / "0.png"), enlarged(photo))


def test_restore_refines_the_faces_and_tells_about_each(model: Path, photo: Path, tmp_path: Path) -> None:
    stablesr_model = tmp_path / "stablesr"
    tiny_pipeline(with_text=False).save_pretrained(stablesr_model)
    out = tmp_path / "out.png"
    arguments = (photo, "-o", out, "--model", stablesr_model, "--scale", 1, "--face", "codeformer")
    result = stablesr("restore", *arguments, "--codeformer", model, "--face-w", 0.6)
    assert result.exit_code == 0, result.stderr
    line, summary = result.stdout.splitlines()
    assert line.startswith(f"{photo}: face 1 of 1 at (")
    assert summary == f"1 restored: {out}"
    again = stablesr("restore", *arguments, "--codeformer", model, "--face-w", 0.5, "--resume")
    assert again.exit_code == 2
    assert "face_w" in again.stderr


def test_the_programs_write_their_sheets(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    runpy.run_path(str(PROGRAMS / "restore_faces.py"))["main"](photo, out, str(model), [0.0, 1.0])
    assert capsys.readouterr().out.startswith("w 0: identity distance ")
    assert pixels_of(out).shape == (TINY_FACE_PX, 3 * TINY_FACE_PX, 3)
    stablesr_model = tmp_path / "stablesr"
    tiny_pipeline(with_text=False).save_pretrained(stablesr_model)
    runpy.run_path(str(PROGRAMS / "restore_old_photo.py"))["main"](
        photo, out, str(model), model=str(stablesr_model), scale=1
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {out}"
    given, without_faces, _ = np.split(pixels_of(out), 3, axis=1)
    assert np.array_equal(given, pixels_of(photo))
    assert (without_faces != given).any()
