"""Losses and tasks for distilling a model of few steps: distribution matching and latent consistency."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor

from stablesr_kit.training.data.batches import SampleDraws


class Found(NamedTuple):
    """Latent and noise that a network predicts from a noised latent, both (B, C, h, w)."""

    x0: Tensor
    noise: Tensor


def take_apart(x: Tensor, prediction: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Found:
    """Latent and noise of x (B, C, h, w) at timestep (B,), from a prediction of the scheduler's type."""
    alpha = scheduler.alphas_cumprod.to(x.device)[timestep].view(-1, 1, 1, 1)
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return Found((x - spread * prediction) / signal, prediction)
    return Found(signal * x - spread * prediction, spread * x + signal * prediction)


def few_timesteps(steps: int) -> list[int]:
    """The timesteps of a student, spread evenly down from the last one: 999; 999, 499; 999, 749, 499, 249."""
    return [round(1000 - 1000 * i / steps) - 1 for i in range(steps)]


def distribution_matching_loss(z: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """A scalar whose gradient moves the latents z (B, C, h, w) from the fake score's result to the real score's.

    x0_fake, x0_real: predictions of both networks from z with the same noise. The gradient of a sample is
    ``(x0_fake - x0_real) / mean |z - x0_real|`` (Yin et al. 2024, DMD, eq. 7 and 8), times 2 / elements of z; it is
    zero if both agree.
    """
    with torch.no_grad():
        size = (z - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        target = z - (x0_fake - x0_real) / size
    return F.mse_loss(z, target)


class ConsistencyTask(NamedTuple):
    """Two neighbouring latents on a path of the teacher, (B, C, h, w), and their timesteps, (B,)."""

    x: Tensor
    timestep: Tensor
    x_before: Tensor
    """The latent one DDIM step later, with less noise."""
    timestep_before: Tensor
    is_first: Tensor
    """(B, 1, 1, 1): x_before has no noise; timestep_before is then 0 instead of -1."""


def consistency_task(
    x0: Tensor, draws: SampleDraws, scheduler: SchedulerMixin, teacher: Callable[[Tensor, Tensor], Tensor]
) -> ConsistencyTask:
    """The latents x0 (B, C, h, w), noised, and the same after one of the teacher's 50 steps (Luo et al. 2023, LCM).

    teacher: (x, timestep) -> prediction.
    """
    timestep = ((draws.uniform() * 50).long() * 20 + 19).to(x0.device)
    x = scheduler.add_noise(x0, draws.normal(x0), timestep)
    with torch.no_grad():
        found = take_apart(x, teacher(x, timestep), timestep, scheduler)
    before = timestep - 20
    alphas = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).to(x.device)
    alpha = alphas[before + 1].view(-1, 1, 1, 1)
    x_before = alpha.sqrt() * found.x0 + (1 - alpha).sqrt() * found.noise
    return ConsistencyTask(x, timestep, x_before, before.clamp(min=0), (before < 0).view(-1, 1, 1, 1))
