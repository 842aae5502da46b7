"""The noising and the loss of a diffusion model (Ho et al. 2020; v-prediction: Salimans and Ho 2022)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.batches import SampleDraws


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """Options of a program that trains by denoising."""

    stratified_timesteps: bool = True
    """Draw one timestep from each of as many equal parts of the schedule as a step has samples: less noise in the loss
    than with timesteps drawn independently."""
    snr_gamma: float | None = None
    """Weigh a sample's loss by min(SNR, gamma) in units of the prediction's own (Hang et al. 2023); 5 is usual, None
    weighs all alike."""


def noise_schedule(prediction_type: str) -> DDPMScheduler:
    """Stable Diffusion's noise schedule, for a network that predicts epsilon or v_prediction.

    Raises ConfigError for another prediction type.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type={prediction_type!r} must be epsilon or v_prediction")
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


class Hidden(NamedTuple):
    """Latents under noise."""

    x: Tensor
    """Noised latent, (B, C, h, w)."""
    timestep: Tensor
    """(B,), whole numbers."""
    target: Tensor
    """What the network is to predict, (B, C, h, w): the noise, or the velocity."""


def hide(x0: Tensor, draws: SampleDraws, schedule: DDPMScheduler, options: DenoisingOptions) -> Hidden:
    """The latents (B, C, h, w) under noise at random timesteps of the schedule."""
    timestep = draws.timesteps(schedule.config.num_train_timesteps, stratified=options.stratified_timesteps)
    timestep = timestep.to(x0.device)
    noise = draws.normal(x0)
    x = schedule.add_noise(x0, noise, timestep).to(memory_format=torch.channels_last)
    is_velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(x0, noise, timestep) if is_velocity else noise
    return Hidden(x, timestep, target)


def denoising_loss(prediction: Tensor, hidden: Hidden, schedule: DDPMScheduler, options: DenoisingOptions) -> Tensor:
    """Mean squared error of the prediction (B, C, h, w), of every sample weighed as the options say."""
    error = (prediction.float() - hidden.target.float()).square().mean(dim=(1, 2, 3))
    if options.snr_gamma is not None:
        snr = compute_snr(schedule, hidden.timestep)
        unit = snr + 1 if schedule.config.prediction_type == "v_prediction" else snr
        error = error * snr.clamp(max=options.snr_gamma) / unit
    return error.mean()
