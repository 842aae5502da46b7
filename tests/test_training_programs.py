"""Every training program runs at a tiny size, from photographs to a pipeline that restores."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

from stablesr_kit.pipelines.stablesr import StableSRPipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRAIN_DATA", str(folder / "photos"))
    yield


def run(monkeypatch: pytest.MonkeyPatch, program: str, config: str, *flags: str) -> None:
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    arguments = [program, "--config", str(ROOT / "configs" / "tiny" / f"{config}.yaml"), *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "training" / f"{program}.py"), run_name="__main__")


def test_the_chain_of_programs_ends_in_a_pipeline_that_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "train_autoencoder", "autoencoder")
    before = load_file("runs/tiny/autoencoder/vae/diffusion_pytorch_model.safetensors")

    run(monkeypatch, "train_decoder", "decoder")
    after = load_file("runs/tiny/decoder/vae/diffusion_pytorch_model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}

    run(monkeypatch, "cache_latents", "latents")
    latents = load_file("runs/tiny/latents/latents.safetensors")
    assert latents["hq"].shape == (2, 4, 16, 16)
    assert latents["lq"].shape == (2, 2, 4, 16, 16)

    run(monkeypatch, "train_prior", "prior")
    run(monkeypatch, "train_stablesr", "stablesr")
    run(monkeypatch, "assemble_pipeline", "pipeline")
    run(monkeypatch, "generate_cfw_data", "cfw_data")
    run(monkeypatch, "train_cfw", "cfw")
    run(monkeypatch, "assemble_pipeline", "pipeline", "--pretrained_cfw", "runs/tiny/cfw/cfw")

    pipeline = StableSRPipeline.from_pretrained("runs/tiny/pipeline", dtype=torch.float32)
    restored = pipeline(Image.open("photos/0.png").resize((16, 12)), w=0.5).images[0]
    assert restored.size == (64, 48)
    assert "_name_or_path" not in Path("runs/tiny/pipeline/unet/config.json").read_text()


def test_a_resumed_run_ends_in_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "train_autoencoder", "autoencoder", "--output_dir", "whole")
    # stopped after two of the four steps: the later checkpoint never came to be
    run(monkeypatch, "train_autoencoder", "autoencoder", "--output_dir", "parts")
    Path("parts/checkpoint-4").rename("parts/checkpoint-4.unfinished")
    run(monkeypatch, "train_autoencoder", "autoencoder", "--output_dir", "parts")
    whole, parts = (load_file(f"{name}/vae/diffusion_pytorch_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
