"""Validation pictures show what a network does while it is trained, and leave the training as it is."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.metrics import psnr, ssim
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.run.validation import (
    PhotoValidationOptions,
    RestorationValidationOptions,
    photo_examples,
    restoration_examples,
)
from stablesr_kit.training.small import build_small_autoencoder
from tests.helpers.photo_files import photo, save_photos
from tests.helpers.training_runs import run_program, tiny, working_folder

PROGRAMS = {
    "train_autoencoder": ("autoencoder", "vae", ["--validation_hq_dir", "held/hq"]),
    "train_decoder": ("decoder", "vae", ["--validation_hq_dir", "held/hq"]),
    "train_stablesr": (
        "stablesr",
        "adapter",
        ["--validation_lq_dir", "held/lq", "--validation_hq_dir", "held/hq", "--validation_inference_steps", "2"],
    ),
    "train_cfw": ("cfw", "cfw", ["--validation_samples", "runs/tiny/cfw_data/samples.safetensors"]),
    "train_vqgan": ("vqgan", "vqgan", ["--validation_hq_dir", "held/faces"]),
    "train_codeformer": (
        "codeformer_stage3",
        "codeformer",
        ["--validation_lq_dir", "held/faces", "--validation_hq_dir", "held/faces"],
    ),
}
"""Programs that validate: the name of their tiny config, that of their result, and what they validate with."""


@pytest.fixture(scope="module", autouse=True)
def folder(photo_runs: Path, face_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with what every program needs from the ones before it."""
    with working_folder(tmp_path_factory.mktemp("validation"), "TRAIN_DATA") as folder:
        shutil.copytree(photo_runs, folder / "runs")
        shutil.copytree(face_runs, folder / "runs", dirs_exist_ok=True)
        save_photos(folder / "held" / "hq", 2, 64, 48)
        faces = save_photos(folder / "held" / "faces", 2, 32, 32)
        (folder / "held" / "lq").mkdir()
        for number in range(2):
            photo(number, 64, 48).reduce(4).save(folder / "held" / "lq" / f"{number:03d}.png")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRAIN_FACES", str(faces))
            yield folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_pictures_are_made_and_measured_and_training_does_not_notice(program: str) -> None:
    config, result, flags = PROGRAMS[program]
    common = ["--max_train_steps", "3", "--lr_scheduler", "constant", "--ema_decay", "0.5"]
    states = []
    for name, own in {"without": [], "with": ["--validation_steps", "2", *flags]}.items():
        run_program(*tiny(program, config, *common, "--output_dir", f"{name}/{config}", *own))
        states.append((torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1:] == states[1][1:]
    without, shown = (Path(name, config) for name in ("without", "with"))
    assert (without / "losses.jsonl").read_text() == (shown / "losses.jsonl").read_text()
    for file in sorted((without / "checkpoint-3").rglob("*.safetensors")):
        assert file.read_bytes() == (shown / file.relative_to(without)).read_bytes(), file
    ours, theirs = (
        load_file(f"{name}/{config}/{result}/diffusion_pytorch_model.safetensors") for name in ("without", "with")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    lines = [json.loads(line) for line in (shown / "validation" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    pictures = sorted((shown / "validation" / "step-000003").iterdir())
    assert [file.name for file in pictures] == ["000.png", "001.png"]
    values = [[line[f"{file.stem}/psnr"] for file in pictures] for line in lines]
    assert [line["psnr"] for line in lines] == pytest.approx([sum(row) / 2 for row in values])
    assert all(0 < value < 60 for row in values for value in row)
    assert values[0] != values[1] != values[2]


def test_what_is_written_is_what_the_averaged_weights_make_of_the_photo() -> None:
    flags = ["--validation_steps", "2", "--validation_hq_dir", "held/hq", "--num_validation_images", "1"]
    run_program(*tiny("train_autoencoder", "autoencoder", "--max_train_steps", "2", "--output_dir", "shown", *flags))
    vae = build_small_autoencoder((8, 16, 16), 4, 1)
    vae.load_state_dict(load_file("shown/checkpoint-2/vae_ema/diffusion_pytorch_model.safetensors"))
    truth = np.asarray(Image.open("held/hq/000.png"))
    with torch.no_grad():
        expected = vae.eval().decode(vae.encode(pixels_to_image(truth)).latent_dist.mean).sample
    written = np.asarray(Image.open("shown/validation/step-000002/000.png"))
    assert (pixels_to_image(written) - expected.clamp(-1, 1)).abs().max() < 1.01 / 127.5
    metrics = json.loads(Path("shown/validation/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["psnr"] == pytest.approx(psnr(written, truth, 4)) == metrics["000/psnr"]
    assert metrics["ssim"] == pytest.approx(ssim(written, truth, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_steps": 1}, "without validation_lq_dir"),
        ({"validation_steps": -1}, "validation_steps=-1 must be at least 0"),
        ({"validation_steps": 1, "num_validation_images": 0, "validation_lq_dir": "lq"}, "at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RestorationValidationOptions(**options)


def test_pictures_too_small_to_measure_are_refused_before_training() -> None:
    save_photos(Path("tiny_ones"), 1, 16, 64)
    with pytest.raises(ConfigError, match=r"16x64 px, expected sides of at least 32 px"):
        photo_examples(PhotoValidationOptions(validation_steps=1, validation_hq_dir="tiny_ones"), 4)
    (alone,) = restoration_examples(RestorationValidationOptions(validation_steps=1, validation_lq_dir="held/hq"))[:1]
    assert alone.hq is None and alone.lq.shape == (1, 3, 64, 48)


def test_niqe_statistics_that_are_none_are_refused() -> None:
    Path("statistics.npz").write_bytes(b"no statistics")
    with pytest.raises(ConfigError, match="give niqe_pris_params.npz"):
        Quality("statistics.npz")
