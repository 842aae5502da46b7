"""Every training program runs at a tiny size, from photographs to a pipeline that restores; however a step's samples
are split, and wherever the run is cut, it ends in the same weights."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

from stablesr_kit.pipelines.stablesr import StableSRPipeline
from tests.helpers.photo_files import save_photos
from tests.helpers.training_runs import (
    ForkedRun,
    assert_a_step_stays_the_same,
    assert_kills_change_nothing,
    assert_overfits,
    run_program,
    tiny,
    weights,
    working_folder,
)
from tests.helpers.vgg_files import random_vgg16, save_vgg16

LOOPS = {
    "train_autoencoder": ("autoencoder", "vae"),
    "train_decoder": ("decoder", "vae"),
    "train_prior": ("prior", "adapter"),
    "train_stablesr": ("stablesr", "adapter"),
    "train_cfw": ("cfw", "cfw"),
    "train_few_step": ("few_step", "pipeline/unet"),
}
"""Programs with a loop: the name of their tiny config, and of a result."""

DISCRIMINATOR = ["PatchDiscriminator.", "ParametrizationList"]
"""Beginnings of the names of its parameters, some of them spectrally normalised."""

CACHED = ["--latents", "runs/tiny/latents/latents.safetensors", "--latent_crop", "16", "--pretrained_vae", "null"]
"""Flags of train_stablesr for latents instead of photographs."""


@pytest.fixture(scope="module", autouse=True)
def folder(photo_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with what every program needs from the ones before it."""
    with working_folder(tmp_path_factory.mktemp("training"), "TRAIN_DATA") as folder:
        shutil.copytree(photo_runs, folder / "runs")
        yield folder


def test_the_chain_of_programs_ends_in_a_pipeline_that_restores() -> None:
    latents = load_file("runs/tiny/latents/latents.safetensors")
    assert latents["hq"].shape == (2, 4, 16, 16)
    assert latents["lq"].shape == (2, 2, 4, 16, 16)
    pipeline = StableSRPipeline.from_pretrained("runs/tiny/pipeline", dtype=torch.float32)
    restored = pipeline(Image.open("pictures/0.png").resize((16, 12)), w=0.5).images[0]
    assert restored.size == (64, 48)
    assert "_name_or_path" not in Path("runs/tiny/pipeline/unet/config.json").read_text()


def test_a_sharpened_decoder_leaves_the_encoder_as_it_was() -> None:
    before, after = weights("runs/tiny/autoencoder/vae"), weights("runs/tiny/decoder/vae")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_step_is_the_same_however_its_samples_are_split_and_activations_kept() -> None:
    calls = {config: tiny(program, config, "--max_train_steps", "2") for program, (config, _) in LOOPS.items()}
    # the pipeline of few steps is in float16, whose roundings would show as differences
    assert_a_step_stays_the_same(calls, dict(LOOPS.values()) | {"few_step": "checkpoint-2/unet"})


def test_fusion_layers_train_with_a_perceptual_loss_and_say_when_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = save_vgg16(random_vgg16(), tmp_path)
    choices = {
        "plain": ["--pixel_loss", "l1"],
        "lpips": ["--pixel_loss", "l1", "--perceptual", "lpips", "--perceptual_weights", str(file)],
        "reconstruction": [],
    }
    first = {}
    for name, flags in choices.items():
        run_program(*tiny("train_cfw", "cfw", "--output_dir", str(tmp_path / name), *flags))
        first[name] = json.loads((tmp_path / name / "losses.jsonl").read_text().splitlines()[0])
    assert caplog.text.count("trains without a perceptual loss") == 2
    assert f"perceptual loss lpips on the VGG-16 of {file}" in caplog.text
    assert first["lpips"]["perceptual"] > 0 and "perceptual" not in first["plain"]
    assert first["lpips"]["pixel"] == first["plain"]["pixel"] < first["reconstruction"]["pixel"]
    results = [weights(tmp_path / name / "cfw") for name in ("plain", "lpips")]
    assert any(not torch.equal(results[0][key], results[1][key]) for key in results[0])


SOURCES = {
    "folder": ["--train_data_dir", "sources/hq"],
    "pairs": ["--train_data_dir", "sources/hq", "--lq_data_dir", "sources/lq"],
    "dataset": ["--train_data_dir", "[]", "--dataset_name", "sources/saved", "--image_column", "photo"],
    "shards": ["--train_data_dir", "[]", "--shards", "sources/set-{000..001}.tar"],
    "queue": ["--train_data_dir", "sources/hq", "--pair_queue_size", "4"],
}
"""Flags for every source of photographs, and for the pair queue."""


@pytest.fixture(scope="module")
def sources(folder: Path) -> Path:
    """The same four photographs in every form, and one that is damaged."""
    place = folder / "sources"
    save_photos(place / "hq", 4, 80, 96)
    save_photos(place / "lq", 4, 20, 24)
    (place / "hq" / "broken.png").write_bytes(b"no picture")
    (place / "lq" / "broken.png").write_bytes(b"no picture")
    files = sorted((place / "hq").iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    features = datasets.Features({"photo": datasets.Image()})
    datasets.Dataset.from_dict({"photo": cells}, features=features).save_to_disk(str(place / "saved"))
    with webdataset.ShardWriter(str(place / "set-%03d.tar"), maxcount=3, verbose=0) as writer:
        for file in files:
            writer.write({"__key__": file.stem, "png": file.read_bytes()})
    return place


@pytest.mark.parametrize("source", SOURCES)
def test_training_on_every_source_resumes_at_the_exact_sample(
    source: str, sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def train(name: str, steps: int) -> Path:
        flags = ["--lr_scheduler", "constant", "--output_dir", f"{sources}/{source}/{name}", *SOURCES[source]]
        run_program(*tiny("train_stablesr", "stablesr", "--max_train_steps", str(steps), *flags))
        return sources / source / name

    whole = train("whole", 5)
    assert "1 of 5 photographs were skipped" in caplog.text
    train("halted", 2)
    resumed = train("halted", 5)
    assert "checkpoint-2 of 5 steps" in caplog.text
    assert (resumed / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    ours, theirs = weights(resumed / "adapter"), weights(whole / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("program", "quantity", "factor", "trained", "flags"),
    [
        ("train_autoencoder", "pixel", 0.3, ["Reconstruction."], ["--random_flip", "false"]),
        (
            "train_decoder",
            "pixel",
            0.4,
            ["Decoding.vae.decoder.", "Decoding.vae.post_quant_conv.", *DISCRIMINATOR],
            ["--random_flip", "false"],
        ),
        ("train_prior", "conditional", 0.5, ["UNet2DConditionModel.", "StableSRAdapter."], []),
        ("train_stablesr", "loss", 0.9, ["StableSRAdapter."], ["--learning_rate", "1e-2", *CACHED]),
        ("train_cfw", "pixel", 0.9, ["FusedDecoding.cfw.", *DISCRIMINATOR], []),
        (
            "train_few_step",
            "pixel_w1",
            0.8,
            [
                "UNet2DConditionModel.",
                "StableSRAdapter.",
                "StudentDecoding.vae.decoder.",
                "StudentDecoding.vae.post_quant_conv.",
                "StudentDecoding.cfw.",
                "UNet2DConditionModel1.",  # the score of the student's latents; the teacher comes after it
                "StableSRAdapter1.",
                *DISCRIMINATOR,
            ],
            [],
        ),
    ],
    ids=[*LOOPS],
)
def test_a_program_overfits_a_few_pictures_and_moves_only_what_it_trains(
    program: str, quantity: str, factor: float, trained: list[str], flags: list[str]
) -> None:
    common = ["--train_batch_size", "4", "--learning_rate", "4e-3", *flags]
    assert_overfits(tiny(program, LOOPS[program][0], *common), quantity, factor, *trained)


@pytest.mark.parametrize("program", LOOPS)
def test_a_run_killed_twice_ends_bitwise_as_if_it_had_not_been(program: str) -> None:
    config, result = LOOPS[program]
    assert_kills_change_nothing(tiny(program, config), result)


@pytest.mark.parametrize("program", LOOPS)
def test_two_processes_killed_twice_end_as_if_they_had_not_been(program: str) -> None:
    config, result = LOOPS[program]
    assert_kills_change_nothing(tiny(program, config, "--adam_epsilon", "1e-4"), result, processes=2)


@pytest.mark.parametrize(
    ("program", "config", "file", "count"),
    [
        ("cache_latents", "latents", "latents.safetensors", ["--crops", "30"]),
        ("generate_cfw_data", "cfw_data", "samples.safetensors", ["--crops", "12", "--batch_size", "1"]),
        ("cache_pairs", "pairs", "pairs.safetensors", ["--crops", "30"]),
    ],
)
def test_data_computed_beforehand_go_on_after_a_kill_to_the_same_file(
    program: str, config: str, file: str, count: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_program(*tiny(program, config, "--output_dir", f"computed/whole/{config}", *count))
    folder = Path("computed/killed", config)
    call = tiny(program, config, "--output_dir", str(folder), *count)
    run = ForkedRun([call])
    run.kill_when(lambda: len(list(folder.glob("*.parts/*.safetensors"))) >= 3)
    behind = sorted(folder.glob("*.parts/*.safetensors"))
    written = [part.stat().st_mtime_ns for part in behind[:3]]
    assert not (folder / file).exists()

    second = ForkedRun([call])
    second.kill_when(lambda: len(list(folder.glob("*.parts/*.safetensors"))) > len(behind))
    assert [part.stat().st_mtime_ns for part in behind[:3]] == written
    run_program(*call)
    assert (folder / file).read_bytes() == Path("computed/whole", config, file).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", file]

    # parts of other options are none of this run
    caplog.clear()
    (folder / f"{file}.parts").mkdir()
    run_program(*call)
    assert "parts of another model or other options, which are deleted" in caplog.text
