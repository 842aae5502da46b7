"""What binds the pictures of a call that are frames of a clip: their noise, their predictions, their grey."""

from typing import Any

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from stablesr_kit import Job, SpacedDDPMScheduler, StableSRPipeline, Tiling
from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from tests.helpers.pipeline_runs import differs, run, same
from tests.helpers.tiny import tiny_picture, tiny_pipeline

FRAME = tiny_picture(5, 6)
SCHEDULERS = (SpacedDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler)


@pytest.fixture(scope="module")
def pipeline() -> StableSRPipeline:
    return tiny_pipeline(with_text=False)


@pytest.mark.parametrize("tile_px", ["none", 16])
def test_frames_with_one_noise_are_restored_alike(pipeline: StableSRPipeline, tile_px: Any) -> None:
    tiling = Tiling(tile_px=tile_px)
    frames = FRAME.repeat(2, 1, 1, 1)
    shared = run(pipeline, frames, job=Job(noise=CanvasNoise([5, 5])), tiling=tiling)
    fresh = run(pipeline, frames, job=Job(noise=CanvasNoise([5, 6])), tiling=tiling)
    same(shared[0], shared[1])
    same(shared[:1], fresh[:1])
    assert differs(fresh[0], fresh[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_predicted_may_be_changed_before_the_scheduler_steps(pipeline: Any, scheduler: Any) -> None:
    stock = pipeline.scheduler
    pipeline.scheduler = scheduler.from_config(stock.config)
    seen: list[tuple[int, float]] = []

    def unchanged(prediction: Tensor, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        assert prediction.shape == latents.shape
        seen.append((step, timestep.item()))
        return prediction

    try:
        without = run(pipeline, num_inference_steps=3)
        same(run(pipeline, num_inference_steps=3, job=Job(on_prediction=unchanged)), without, atol=0)
        assert [step for step, _ in seen] == [0, 1, 2]
        assert [time for _, time in seen] == sorted((time for _, time in seen), reverse=True)
        halved = run(pipeline, num_inference_steps=3, job=Job(on_prediction=lambda prediction, *_: prediction / 2))
        assert differs(halved, without)
    finally:
        pipeline.scheduler = stock


def test_a_clip_decides_whether_its_frames_are_grey(pipeline: StableSRPipeline) -> None:
    grey = FRAME.mean(1, keepdim=True).expand(-1, 3, -1, -1)

    def has_colour(picture: Tensor, is_grey: bool | None) -> bool:
        return differs(*run(pipeline, picture, job=Job(is_grey=is_grey))[0, :2])

    assert [has_colour(FRAME, decided) for decided in (None, False, True)] == [True, True, False]
    assert [has_colour(grey, decided) for decided in (None, False, True)] == [False, True, False]
