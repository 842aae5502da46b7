"""Schedulers, timesteps, and where a call starts."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from stablesr_kit import SpacedDDIMScheduler, SpacedDDPMScheduler
from stablesr_kit.imaging.canvas import View
from stablesr_kit.models.steering import steered_prediction
from tests.helpers.pipeline_runs import PICTURE, differs, run, same
from tests.helpers.tiny import seeded, tiny_pipeline, unit_noise

SCHEDULERS = [
    SpacedDDPMScheduler,
    SpacedDDIMScheduler,
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
]


every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)


@every_scheduler
@pytest.mark.parametrize("start", ["lq", "noise", 600])
def test_every_scheduler_starts_from_lq_from_noise_and_from_a_timestep(kind: Any, start: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    visited: list[float] = []

    def note(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        visited.append(float(timestep))
        return tensors

    if kind is PNDMScheduler and start == 600:  # counts its steps from the first on
        with pytest.raises(ValueError, match="PNDMScheduler can only run from its first timestep.*take another"):
            run(pipeline, num_inference_steps=4, start=start)
        return
    restored = run(pipeline, num_inference_steps=4, start=start, callback_on_step_end=note)
    assert torch.isfinite(restored).all()
    assert visited == sorted(visited, reverse=True) and len(visited) == pipeline.num_timesteps
    assert visited[0] <= (600 if start == 600 else 999)
    assert visited[0] > (200 if start == 600 else 700)


@pytest.mark.parametrize(
    "kind",
    [
        SpacedDDIMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("start", ["lq", 700, 300])
def test_the_latent_has_the_noise_level_of_its_timestep_wherever_it_starts(kind: Any, start: Any) -> None:
    config = SpacedDDPMScheduler(timestep_spacing="trailing").config
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(config))
    scheduler = pipeline.scheduler
    x0, noise = unit_noise(1, 4, 4, 4, seed=1), unit_noise(1, 4, 4, 4, seed=2)
    timesteps = pipeline.get_timesteps(10, torch.device("cpu"), start)
    if hasattr(scheduler, "begin_index"):
        assert scheduler.begin_index == len(scheduler.timesteps) - len(timesteps)
    x = pipeline.prepare_latents(x0, timesteps, start, latents=noise)
    for i, timestep in enumerate(timesteps):
        alpha = scheduler.alphas_cumprod[timestep.long()]
        if i % scheduler.order == 0:  # Heun's second visits are in between
            seen = scheduler.scale_model_input(x, timestep)
            same(seen, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, atol=2e-3)
        else:
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(noise, timestep, x, return_dict=False)[0]
    same(x, x0, atol=2e-3)


@every_scheduler
def test_a_start_from_noise_shows_the_unet_noise_of_variance_one(kind: Any) -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(SpacedDDPMScheduler().config))
    noise = unit_noise(1, 4, 4, 4)
    timesteps = pipeline.get_timesteps(10, torch.device("cpu"), "noise")
    latents = pipeline.prepare_latents(torch.zeros_like(noise), timesteps, "noise", latents=noise)
    same(pipeline.scheduler.scale_model_input(latents, timesteps[0]), noise, atol=2e-2)


@pytest.mark.parametrize("kind", [SpacedDDPMScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_a_call_is_its_public_steps_in_order(kind: Any) -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(SpacedDDPMScheduler().config))
    called = run(pipeline, num_inference_steps=3, w=1.0, color_fix="none")
    generator, scheduler = seeded(0), pipeline.scheduler
    enlarged, canvas = pipeline.prepare_image(View(PICTURE * 2 - 1))
    lq_latents, features = pipeline.encode([canvas], generator)
    embeds, _ = pipeline.encode_prompt(None, torch.device("cpu"), 1, False)
    timesteps = pipeline.get_timesteps(3, torch.device("cpu"), "lq")
    latents = pipeline.prepare_latents(lq_latents, timesteps, "lq", generator)
    for timestep in timesteps:
        x = scheduler.scale_model_input(latents, timestep)
        prediction = steered_prediction(pipeline.unet, pipeline.adapter, x, timestep, lq_latents, embeds)
        latents = scheduler.step(prediction, timestep, latents, generator=generator).prev_sample
    decoded = pipeline.decode(latents, features, 1.0)
    restored = pipeline.finish(decoded, [enlarged], [View(PICTURE * 2 - 1)], color_fix="none", output_type="pt")
    same(restored, called)


def test_a_start_above_the_first_timestep_is_the_start_from_lq() -> None:
    pipeline = tiny_pipeline(with_text=False)
    assert torch.equal(run(pipeline, start=999), run(pipeline))
    assert differs(run(pipeline, start="noise"), run(pipeline))


def test_a_late_start_stays_near_the_input() -> None:
    pipeline = tiny_pipeline(with_text=False)
    lq_latents, _ = pipeline.encode([pipeline.prepare_image(View(PICTURE * 2 - 1))[1]], seeded(0), False)
    far, near = (run(pipeline, output_type="latent", num_inference_steps=4, start=start) for start in ("lq", 0))
    assert (near - lq_latents).abs().max() < 0.2 < (far - lq_latents).abs().max()


def test_a_start_below_every_timestep_is_refused() -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=DDPMScheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="start=3 lies below the last timestep 499; give more steps"):
        run(pipeline, start=3)


def test_own_timesteps_are_kept() -> None:
    pipeline, visited = tiny_pipeline(with_text=False), []

    def note(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        visited.append(int(timestep))
        return tensors

    run(pipeline, timesteps=[900, 300, 20], callback_on_step_end=note)
    assert visited == [900, 300, 20]


def test_the_default_number_of_steps_belongs_to_the_pipeline() -> None:
    pipeline = tiny_pipeline(with_text=False, default_steps=3)
    run(pipeline)
    assert pipeline.num_timesteps == 3
    run(pipeline, num_inference_steps=1)
    assert pipeline.num_timesteps == 1
