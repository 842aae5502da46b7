"""A restoration that is stopped after any step goes on to the same bits, in memory, through a file and SIGKILL."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from stablesr_kit import Job, SpacedDDPMScheduler, StableSRPipeline, Tiling
from stablesr_kit.cli import main
from stablesr_kit.errors import JobError
from stablesr_kit.pipelines.job import SamplingState
from tests.helpers.forks import FORKS
from tests.helpers.tiny import seeded, tiny_pipeline

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
SCHEDULERS = (
    SpacedDDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)


@pytest.mark.parametrize("tile_px", ["none", 16])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_saved_step_leads_to_the_same_bits(scheduler: Any, tile_px: Any, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "tiling": Tiling(tile_px=tile_px, vae_tile_px=512), "output_type": "latent"}
    generator = seeded(3)

    def save(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        SamplingState.after(step + 1, tensors["latents"], pipeline.scheduler, generator).save(tmp_path / f"{step}.pt")
        return tensors

    whole = pipeline(PICTURE, generator=generator, callback_on_step_end=save, **options).images
    for step in range(3):
        state = SamplingState.load(tmp_path / f"{step}.pt")
        assert torch.equal(pipeline(PICTURE, generator=seeded(3), job=Job(state=state), **options).images, whole), step


def test_tiles_that_were_halved_stay_halved(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "tiling": Tiling(tile_px=32, vae_tile_px=512), "output_type": "latent"}
    largest: list[int] = []

    def lacking_memory_at_the_second_step(_unet: Any, args: tuple[torch.Tensor, ...]) -> None:
        largest.append(max(args[0].shape))
        if (tmp_path / "0.pt").exists() and max(args[0].shape) > 4:
            raise MemoryError

    def save(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        SamplingState.after(
            step + 1, tensors["latents"], pipeline.scheduler, None, pipeline.aggregation.grid, pipeline.coder.tile_px
        ).save(tmp_path / f"{step}.pt")
        return tensors

    hook = pipeline.unet.register_forward_pre_hook(lacking_memory_at_the_second_step)
    halved = pipeline(PICTURE, generator=seeded(3), callback_on_step_end=save, **options).images
    assert largest[0] == 8
    assert largest[-1] == 4
    hook.remove()
    assert not torch.equal(pipeline(PICTURE, generator=seeded(3), **options).images, halved)
    for step in (1, 2):
        state = SamplingState.load(tmp_path / f"{step}.pt")
        assert torch.equal(pipeline(PICTURE, generator=seeded(3), job=Job(state=state), **options).images, halved)


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    SamplingState.after(1, torch.zeros(1, 4, 2, 2), SpacedDDPMScheduler(), None).save(tmp_path / "s.pt")
    content = (tmp_path / "s.pt").read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"text"):
        (tmp_path / "s.pt").write_bytes(damaged)
        with pytest.raises(JobError, match=r"s\.pt: the state cannot be read .*; start again") as caught:
            SamplingState.load(tmp_path / "s.pt")
        assert "\n" not in str(caught.value)


def test_kills_in_every_stage_and_the_file_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    pipeline: StableSRPipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    saved = tmp_path / ".stablesr" / "killed.png.job" / "sampling.pt"
    encoded, decoded = (saved.parent / stage / "record.pt" for stage in ("encode-0", "decode-0"))
    options = ("--model", tmp_path / "model", "--steps", 4, "--tile", 32, "--resume", "-o")
    arguments = ("restore", tmp_path / "in.png", *options)

    def exit_status(output: Path, last: Path | None = None, count: int = 0) -> int | None:
        process = FORKS.Process(target=_run, args=([*map(str, (*arguments, output))], last, count))
        process.start()
        process.join()
        return process.exitcode

    whole, killed = tmp_path / "whole.png", tmp_path / "killed.png"
    assert exit_status(whole) == 0
    assert exit_status(killed, encoded, 5) == -signal.SIGKILL
    assert exit_status(killed, saved, 1) == -signal.SIGKILL
    assert not saved.exists()
    assert exit_status(killed, saved, 3) == -signal.SIGKILL
    assert SamplingState.load(saved).step == 2
    assert exit_status(killed, decoded, 5) == -signal.SIGKILL
    assert SamplingState.load(saved).step == 4
    decoded_then = decoded.stat().st_mtime_ns
    assert exit_status(killed, killed) == -signal.SIGKILL
    assert decoded.stat().st_mtime_ns > decoded_then
    assert not killed.exists()
    assert exit_status(killed) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "killed.png", "model", "whole.png"}


def _run(arguments: list[str], last: Path | None, count: int) -> None:
    """The command in a process of its own, killed when it is about to put `last` in its place for the count-th time."""
    seen = 0

    def kill(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and details[1] == str(last):
            seen += 1
            if seen >= count:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.addaudithook(kill)
    sys.argv[1:] = arguments
    main()
