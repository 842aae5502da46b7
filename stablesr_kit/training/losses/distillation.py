"""What a student of few steps learns from: its own steps, taken apart, and two scores that disagree."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor

from stablesr_kit.training.data.batches import SampleDraws


class Found(NamedTuple):
    """The two parts of a noised latent as a network sees them, both (B, C, h, w)."""

    x0: Tensor
    noise: Tensor


def take_apart(x: Tensor, prediction: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Found:
    """Latent and noise in x (B, C, h, w) at timestep (B,), by the network's prediction of the schedule's type."""
    alpha = scheduler.alphas_cumprod.to(x.device)[timestep].view(-1, 1, 1, 1)
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return Found((x - spread * prediction) / signal, prediction)
    return Found(signal * x - spread * prediction, spread * x + signal * prediction)


def few_timesteps(steps: int) -> list[int]:
    """The timesteps of a student, spread evenly down from the last one: 999; 999, 499; 999, 749, 499, 249."""
    return [round(1000 - 1000 * i / steps) - 1 for i in range(steps)]


def distribution_matching_loss(z: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """A scalar whose gradient moves the latents z (B, C, h, w) from what the fake score sees in them to the real one's.

    x0_fake, x0_real: what both networks find in z under the same noise. The gradient of a sample is
    ``(x0_fake - x0_real) / mean |z - x0_real|`` (Yin et al. 2024, DMD, eq. 7 and 8), times 2 / elements of z;
    none where the two agree.
    """
    with torch.no_grad():
        size = (z - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        target = z - (x0_fake - x0_real) / size
    return F.mse_loss(z, target)


class ConsistencyTask(NamedTuple):
    """Two latents on one way of the teacher, (B, C, h, w), and their timesteps, (B,)."""

    x: Tensor
    timestep: Tensor
    x_before: Tensor
    """One step of DDIM further down, where less noise is left."""
    timestep_before: Tensor
    is_first: Tensor
    """(B, 1, 1, 1): no noise is left in x_before, and timestep_before is 0 in place of -1."""


def consistency_task(
    x0: Tensor, draws: SampleDraws, scheduler: SchedulerMixin, teacher: Callable[[Tensor, Tensor], Tensor]
) -> ConsistencyTask:
    """The latents x0 (B, C, h, w) under noise, and after one of the teacher's 50 steps (Luo et al. 2023, LCM).

    teacher: its prediction of x at a timestep.
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
