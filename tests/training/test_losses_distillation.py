"""What students of few steps learn from: their steps are DDIM's, and scores that agree leave them alone."""

import pytest
import torch

from stablesr_kit.training.data.batches import SampleDraws
from stablesr_kit.training.losses.denoising import noise_schedule
from stablesr_kit.training.losses.distillation import (
    consistency_task,
    distribution_matching_loss,
    few_timesteps,
    take_apart,
)
from stablesr_kit.training.small import build_small_scheduler


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_visits_the_timesteps_that_its_pipeline_will(steps: int) -> None:
    scheduler = build_small_scheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == few_timesteps(steps)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_of_the_student_is_a_step_of_ddim(kind: str, latents: torch.Tensor) -> None:
    schedule, scheduler = noise_schedule(kind), build_small_scheduler(kind)
    scheduler.set_timesteps(2)
    prediction = latents.flip(0)
    found = take_apart(latents, prediction, torch.tensor([999, 999]), schedule)
    ours = schedule.add_noise(found.x0, found.noise, torch.tensor([499, 499]))
    theirs = scheduler.step(prediction, 999, latents).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_right_prediction_is_taken_apart_into_what_was_put_together(kind: str, latents: torch.Tensor) -> None:
    schedule, noise, timestep = noise_schedule(kind), latents.flip(0), torch.tensor([10, 700])
    x = schedule.add_noise(latents, noise, timestep)
    right = noise if kind == "epsilon" else schedule.get_velocity(latents, noise, timestep)
    found = take_apart(x, right, timestep, schedule)
    torch.testing.assert_close(found.x0, latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.noise, noise, rtol=1e-4, atol=1e-4)


def test_scores_that_agree_give_no_gradient(latents: torch.Tensor) -> None:
    z = latents.clone().requires_grad_()
    real = latents.flip(0)
    distribution_matching_loss(z, real, real).backward()
    assert z.grad is not None and z.grad.abs().max() == 0


def test_scores_that_differ_give_their_difference_over_the_distance_of_each_sample(latents: torch.Tensor) -> None:
    z = latents.clone().requires_grad_()
    real = latents.flip(0) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    fake = real + 0.1 * latents
    distribution_matching_loss(z, fake, real).backward()
    size = (latents - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(z.grad, 2 / latents.numel() * (fake - real) / size)


def test_the_way_of_a_perfect_teacher_leads_to_the_latent(latents: torch.Tensor) -> None:
    schedule = noise_schedule("epsilon")

    def teacher(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha = schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return (x - alpha.sqrt() * latents) / (1 - alpha).sqrt()

    way = consistency_task(latents, SampleDraws(0, torch.tensor([3, 4]), 2), schedule, teacher)
    assert ((way.timestep + 1) % 20 == 0).all() and (way.timestep_before == (way.timestep - 20).clamp(min=0)).all()
    found = take_apart(way.x_before, teacher(way.x_before, way.timestep_before), way.timestep_before, schedule)
    torch.testing.assert_close(found.x0, latents, rtol=1e-3, atol=1e-3)
