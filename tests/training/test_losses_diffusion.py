"""The loss of a denoiser: targets by their definitions, weights by the paper's, and one call of the official code."""

from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import ConfigError
from stablesr_kit.training.losses.denoising import denoising_loss, hide_in_noise

SCHEDULERS = [DDPMScheduler, DDIMScheduler, SpacedDDPMScheduler]
TIMESTEP = torch.tensor([0, 17, 999])


def latents(seed: int) -> Tensor:
    return torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_answers_what_was_hidden(scheduler_class: type, kind: str) -> None:
    """A network that answers with the target lets x0 be computed from x."""
    scheduler = scheduler_class(beta_schedule="scaled_linear", prediction_type=kind)
    x0, noise = latents(0), latents(1)
    hidden = hide_in_noise(x0, noise, TIMESTEP, scheduler)
    a = scheduler.alphas_cumprod[TIMESTEP].view(-1, 1, 1, 1)
    torch.testing.assert_close(hidden.x, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    if kind == "epsilon":
        assert torch.equal(hidden.target, noise)
    else:
        torch.testing.assert_close(a.sqrt() * hidden.x - (1 - a).sqrt() * hidden.target, x0, atol=1e-5, rtol=0)


def test_without_weights_the_loss_is_the_mean_squared_error_in_float32() -> None:
    scheduler = DDPMScheduler()
    prediction, target = latents(0).bfloat16(), latents(1)
    loss = denoising_loss(prediction, target, TIMESTEP, scheduler)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (prediction.float() - target).square().mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_snr_weights_make_the_loss_a_clipped_one_of_x0(kind: Literal["epsilon", "v_prediction"]) -> None:
    """Whatever is predicted, min-SNR weighs the squared error of x0 by min(snr, gamma) (Hang et al. 2023, sec. 3.4)."""
    scheduler = SpacedDDPMScheduler(prediction_type=kind)
    x0, noise = latents(0).double(), latents(1).double()
    hidden = hide_in_noise(x0, noise, TIMESTEP, scheduler)
    prediction = hidden.target + 0.1 * latents(2)
    a = scheduler.alphas_cumprod[TIMESTEP].double().view(-1, 1, 1, 1)
    if kind == "epsilon":
        denoised = (hidden.x - (1 - a).sqrt() * prediction) / a.sqrt()
    else:
        denoised = a.sqrt() * hidden.x - (1 - a).sqrt() * prediction
    snr = (a / (1 - a)).view(-1)
    expected = (snr.clamp(max=5) * (denoised - x0).square().mean((1, 2, 3))).mean()
    loss = denoising_loss(prediction, hidden.target, TIMESTEP, scheduler, snr_gamma=5.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_prediction_that_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="prediction_type='sample' cannot be trained"):
        hide_in_noise(latents(0), latents(1), TIMESTEP, SpacedDDPMScheduler(prediction_type="sample"))
