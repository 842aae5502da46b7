"""Training a denoiser: noised latents, prediction targets, and the loss."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import compute_snr
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.data.batches import SampleDraws


class Noised(NamedTuple):
    """A noised latent and the prediction target, both (B, C, h, w)."""

    x: Tensor
    target: Tensor


def hide_in_noise(x0: Tensor, noise: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Noised:
    """The latent x0 (B, C, h, w), noised to timestep (B,), and the target of the prediction type.

    The target is the noise for "epsilon" and sqrt(a) noise - sqrt(1 - a) x0 for "v_prediction" (Salimans and Ho 2022).
    Raises ConfigError for another prediction type.
    """
    x = scheduler.add_noise(x0, noise, timestep)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return Noised(x, noise)
    if kind == "v_prediction":
        return Noised(x, scheduler.get_velocity(x0, noise, timestep))
    raise ConfigError(f"prediction_type={kind!r} cannot be trained; use a scheduler of epsilon or v_prediction")


def denoising_loss(
    prediction: Tensor, target: Tensor, timestep: Tensor, scheduler: SchedulerMixin, *, snr_gamma: float | None = None
) -> Tensor:
    """Mean squared difference in float32 of prediction and target (B, C, h, w), a scalar.

    snr_gamma: samples count min(snr, gamma) / snr (epsilon) or min(snr, gamma) / (snr + 1) (v_prediction), where snr
    is the signal-to-noise ratio at their timestep (B,) (Hang et al. 2023, Min-SNR; 5 is usual); None: equal weights.
    """
    squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if snr_gamma is None:
        return squares.mean()
    snr = compute_snr(scheduler, timestep)
    divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    weights = torch.clamp(snr, max=snr_gamma) / divisor
    return (weights * squares.mean(dim=tuple(range(1, squares.ndim)))).mean()


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """Noise and loss of a diffusion model."""

    stratified_timesteps: bool = True
    """Divide the schedule into as many equal parts as a step has samples, and draw one timestep from each; the loss has
    less noise than with independent timesteps."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss (Hang et al. 2023) with this gamma; 5 is usual; None: no weighting."""
    enable_xformers_memory_efficient_attention: bool = False
    """Compute attention with xformers, on GPUs; torch's own attention usually needs no more memory."""


def enable_xformers(options: DenoisingOptions, *networks: ModelMixin) -> None:
    """Switch the attention of networks to xformers if the options say so.

    Raises ConfigError if it is not installed or there is no GPU.
    """
    if not options.enable_xformers_memory_efficient_attention:
        return
    for network in networks:
        try:
            network.enable_xformers_memory_efficient_attention()
        # Not installed; no GPU; no kernel for this GPU.
        except (ModuleNotFoundError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"enable_xformers_memory_efficient_attention=true: {str(error).splitlines()[0]}; "
                "it needs a GPU and `pip install 'stablesr-kit[xformers]'`; otherwise leave it out"
            ) from error


def noise_schedule(prediction_type: str) -> DDPMScheduler:
    """Stable Diffusion's noise schedule, for a network that predicts epsilon or v_prediction.

    Raises ConfigError for another prediction type.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type={prediction_type!r} must be epsilon or v_prediction")
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


class DenoisingTask(NamedTuple):
    """Noised latents, and the targets of the prediction."""

    x: Tensor
    """Noised latent, (B, C, h, w)."""
    timestep: Tensor
    """(B,), whole numbers."""
    target: Tensor
    """Noise or velocity, (B, C, h, w)."""
    schedule: DDPMScheduler
    options: DenoisingOptions

    def loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error of the prediction (B, C, h, w), weighed as the options say."""
        return denoising_loss(prediction, self.target, self.timestep, self.schedule, snr_gamma=self.options.snr_gamma)


def denoising_task(x0: Tensor, draws: SampleDraws, schedule: DDPMScheduler, options: DenoisingOptions) -> DenoisingTask:
    """The latents (B, C, h, w), noised to random timesteps of the schedule."""
    timestep = draws.timesteps(schedule.config.num_train_timesteps, stratified=options.stratified_timesteps)
    timestep = timestep.to(x0.device)
    x, target = hide_in_noise(x0, draws.normal(x0), timestep, schedule)
    return DenoisingTask(x.to(memory_format=torch.channels_last), timestep, target, schedule, options)
