"""The loss of a denoiser: hide a latent in noise, compare what the network says with what it should have said."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor

from stablesr_kit.errors import ConfigError


class Hidden(NamedTuple):
    """What the denoiser is given and what it should answer, both (B, C, h, w)."""

    x: Tensor
    target: Tensor


def hide_in_noise(x0: Tensor, noise: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Hidden:
    """The latent x0 (B, C, h, w) under noise at timestep (B,), and the target that the prediction type asks for.

    The target is the noise for "epsilon" and sqrt(a) noise - sqrt(1 - a) x0 for "v_prediction" (Salimans and Ho 2022).
    Raises ConfigError for another prediction type.
    """
    x = scheduler.add_noise(x0, noise, timestep)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return Hidden(x, noise)
    if kind == "v_prediction":
        return Hidden(x, scheduler.get_velocity(x0, noise, timestep))
    raise ConfigError(f"prediction_type={kind!r} cannot be trained; use a scheduler of epsilon or v_prediction")


def denoising_loss(
    prediction: Tensor, target: Tensor, timestep: Tensor, scheduler: SchedulerMixin, *, snr_gamma: float | None = None
) -> Tensor:
    """Mean squared difference in float32 of prediction and target (B, C, h, w), a scalar.

    snr_gamma: samples count min(snr, gamma) / snr (epsilon) or min(snr, gamma) / (snr + 1) (v_prediction), where snr
    is the signal-to-noise ratio at their timestep (B,) (Hang et al. 2023, Min-SNR; 5 is usual); None counts all alike.
    """
    squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if snr_gamma is None:
        return squares.mean()
    snr = compute_snr(scheduler, timestep)
    divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    weights = torch.clamp(snr, max=snr_gamma) / divisor
    return (weights * squares.mean(dim=tuple(range(1, squares.ndim)))).mean()
