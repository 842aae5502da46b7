"""Noise of a canvas: unit, independent of the canvas' size, and what every scheduler draws while it is in place."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from stablesr_kit import SpacedDDIMScheduler, SpacedDDPMScheduler
from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from tests.helpers.tiny import seeded, unit_noise


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = CanvasNoise([0, 1]).draw((2, 4, 200, 150), (0,))
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    for shifted in (noise.roll(1, 2), noise.roll(64, 2), noise.roll(64, 3), noise.roll(1, 1), noise.flip(0)):
        assert abs((noise * shifted).mean().item()) < 0.015


def test_noise_depends_on_the_absolute_position_and_not_on_the_canvas() -> None:
    noise = CanvasNoise([7])
    large = noise.draw((1, 4, 150, 90), (3, 1))
    assert torch.equal(noise.draw((1, 4, 65, 40), (3, 1)), large[:, :, :65, :40])
    assert not torch.equal(noise.draw((1, 4, 150, 90), (3, 2)), large)
    assert not torch.equal(CanvasNoise([8]).draw((1, 4, 150, 90), (3, 1)), large)


def test_seeds_come_from_the_generators_and_use_them_up() -> None:
    generator = seeded(0)
    first, second = CanvasNoise.from_generator(generator, 2), CanvasNoise.from_generator(generator, 2)
    assert first.seeds == CanvasNoise.from_generator(seeded(0), 2).seeds
    assert len({*first.seeds, *second.seeds}) == 4
    assert CanvasNoise.from_generator([seeded(0), seeded(1)], 2).seeds[0] == first.seeds[0]


def test_noise_for_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="noise for 2 pictures"):
        CanvasNoise([0]).draw((2, 4, 8, 8), (0,))


@pytest.mark.parametrize(
    "scheduler",
    [
        SpacedDDPMScheduler(),
        SpacedDDIMScheduler(),
        DDPMScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        EulerAncestralDiscreteScheduler(),
        KDPM2AncestralDiscreteScheduler(),
        LCMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_draws_the_noise_of_its_place(scheduler: Any) -> None:
    noise = CanvasNoise([5])
    outputs = []
    for height in (70, 100):
        scheduler.set_timesteps(4)
        x = torch.ones(1, 4, height, 20)
        eta = {"eta": 1.0} if isinstance(scheduler, SpacedDDIMScheduler) else {}
        for step, timestep in enumerate(scheduler.timesteps[:2]):
            with noise.replacing_randn(step):
                x = scheduler.step(x, timestep, x, **eta).prev_sample
        outputs.append(x)
    assert outputs[0].std() > 0
    assert torch.equal(outputs[0], outputs[1][:, :, :70])


def test_a_posterior_draws_the_noise_of_its_place() -> None:
    moments = unit_noise(1, 8, 70, 20)
    posterior = DiagonalGaussianDistribution(moments)
    with CanvasNoise([5]).replacing_randn(0):
        sample = posterior.sample()
    torch.testing.assert_close((sample - posterior.mean) / posterior.std, CanvasNoise([5]).draw(sample.shape, (0, 0)),
                               atol=1e-4, rtol=1e-4)  # fmt: skip
