"""A restoration that is stopped after any step goes on to the same bits, in memory and through a file."""

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

from stablesr_kit import SpacedDDPMScheduler
from stablesr_kit.errors import JobError
from stablesr_kit.pipelines.sampling_state import SamplingState
from tests.tiny import seeded, tiny_pipeline

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
    options = {"num_inference_steps": 4, "tile_px": tile_px, "output_type": "latent"}
    generator = seeded(3)

    def save(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        SamplingState.after(step + 1, tensors["latents"], pipeline.scheduler, generator).save(tmp_path / f"{step}.pt")
        return tensors

    whole = pipeline(PICTURE, generator=generator, callback_on_step_end=save, **options).images
    for step in range(3):
        state = SamplingState.load(tmp_path / f"{step}.pt")
        assert torch.equal(pipeline(PICTURE, generator=seeded(3), state=state, **options).images, whole), step


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    SamplingState.after(1, torch.zeros(1, 4, 2, 2), SpacedDDPMScheduler(), None).save(tmp_path / "s.pt")
    content = (tmp_path / "s.pt").read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"text"):
        (tmp_path / "s.pt").write_bytes(damaged)
        with pytest.raises(JobError, match=r"s\.pt: the state cannot be read .*; start again") as caught:
            SamplingState.load(tmp_path / "s.pt")
        assert "\n" not in str(caught.value)
