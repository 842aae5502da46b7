"""Every training program runs at a tiny size, from photographs to a pipeline that restores; however a step's samples
are split, and wherever the run is cut, it ends in the same weights."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.pipelines.stablesr import StableSRPipeline
from tests.photo_files import save_photos
from tests.training_runs import ROOT, run_program, run_programs
from tests.vgg_files import random_vgg16, save_vgg16

LOOPS = {
    "train_autoencoder": ("autoencoder", "vae"),
    "train_decoder": ("decoder", "vae"),
    "train_prior": ("prior", "adapter"),
    "train_stablesr": ("stablesr", "adapter"),
    "train_cfw": ("cfw", "cfw"),
}
"""Programs with a loop: the name of their tiny config, and of a result."""


def tiny(program: str, config: str, *flags: str) -> list[str]:
    return [program, "--config", str(ROOT / "configs" / "tiny" / f"{config}.yaml"), *flags]


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def launch_two_processes(calls: list[list[str]]) -> None:
    """Run the programs in two processes that talk through gloo."""
    Path("calls.json").write_text(json.dumps(calls))
    config = str(ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    run = start([*launcher, str(ROOT / "tests" / "training_runs.py"), "calls.json"])
    try:
        _, errors = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 0, errors[-4000:]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with what every program needs from the ones before it."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRAIN_DATA", str(folder / "photos"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run_programs(
            [
                tiny("train_autoencoder", "autoencoder"),
                tiny("train_decoder", "decoder"),
                tiny("cache_latents", "latents"),
                tiny("train_prior", "prior"),
                tiny("train_stablesr", "stablesr"),
                tiny("assemble_pipeline", "pipeline"),
                tiny("generate_cfw_data", "cfw_data"),
                tiny("train_cfw", "cfw"),
                tiny("assemble_pipeline", "pipeline", "--pretrained_cfw", "runs/tiny/cfw/cfw"),
            ]
        )
        yield folder
        torch.set_num_threads(threads)


def test_the_chain_of_programs_ends_in_a_pipeline_that_restores() -> None:
    latents = load_file("runs/tiny/latents/latents.safetensors")
    assert latents["hq"].shape == (2, 4, 16, 16)
    assert latents["lq"].shape == (2, 2, 4, 16, 16)
    pipeline = StableSRPipeline.from_pretrained("runs/tiny/pipeline", dtype=torch.float32)
    restored = pipeline(Image.open("photos/0.png").resize((16, 12)), w=0.5).images[0]
    assert restored.size == (64, 48)
    assert "_name_or_path" not in Path("runs/tiny/pipeline/unet/config.json").read_text()


def test_a_sharpened_decoder_leaves_the_encoder_as_it_was() -> None:
    before, after = weights("runs/tiny/autoencoder/vae"), weights("runs/tiny/decoder/vae")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_step_is_the_same_however_its_samples_are_split() -> None:
    def calls(name: str, *flags: str) -> list[list[str]]:
        common = ["--max_train_steps", "3", "--adam_epsilon", "1e-4", *flags]
        return [
            tiny(program, config, "--output_dir", f"{name}/{config}", *common) for program, (config, _) in LOOPS.items()
        ]

    run_programs(calls("whole", "--train_batch_size", "4"))
    run_programs(calls("accumulated", "--train_batch_size", "2", "--gradient_accumulation_steps", "2"))
    launch_two_processes(calls("shared", "--train_batch_size", "2"))
    for config, result in LOOPS.values():
        whole = weights(f"whole/{config}/{result}")
        for name in ("accumulated", "shared"):
            split = weights(f"{name}/{config}/{result}")
            worst = max(float((whole[key] - split[key]).abs().max()) for key in whole)
            assert worst <= 1e-6, (config, name, worst)


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


@pytest.mark.parametrize("program", ["train_autoencoder", "train_cfw"])
def test_a_run_killed_three_times_ends_bitwise_as_if_it_had_not_been(program: str) -> None:
    config, result = LOOPS[program]
    whole, killed = Path("unbroken", config), Path("killed", config)
    flags = ["--max_train_steps", "14", "--checkpointing_steps", "2", "--output_dir"]
    run_program(*tiny(program, config, *flags, str(whole)))
    draws = random.Random(program)
    for part in range(3):
        call = tiny(program, config, *flags, str(killed))
        run = start([sys.executable, str(ROOT / "training" / f"{program}.py"), *call[1:]])
        wait_for_step(killed / "losses.jsonl", 3 * part + draws.randint(2, 4), run)
        run.kill()
        run.communicate()
        assert not (killed / result).exists()
    run_program(*tiny(program, config, *flags, str(killed)))

    assert (killed / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    last = "checkpoint-14"
    for file in sorted((whole / last).rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes(), file
    for file in sorted((whole / last).glob("optimizer*.bin")):
        states = [torch.load(folder / last / file.name)["state"] for folder in (whole, killed)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def wait_for_step(records: Path, step: int, run: subprocess.Popen[str]) -> None:
    """Return when so many steps are recorded."""
    while not records.exists() or len(records.read_text().splitlines()) < step:
        assert run.poll() is None, run.communicate()[1][-2000:]
        time.sleep(0.001)
