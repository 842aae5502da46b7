"""Does a UNet predict the noise or the velocity? No shape tells, so every other source is asked."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler

PredictionType = Literal["epsilon", "v_prediction"]


class Prediction(NamedTuple):
    """What the UNet predicts, and how that is known."""

    type: PredictionType
    source: str
    is_certain: bool

    def __str__(self) -> str:
        return f"{self.type} ({'' if self.is_certain else 'assumed: '}{self.source})"


NAMES: Mapping[str, PredictionType] = {
    r"v[-_]?pred": "v_prediction",
    r"768": "v_prediction",
    r"turbo": "epsilon",
    r"512": "epsilon",
    r"stablesr_000117": "epsilon",
}
"""What published file names say, the first that matches: Stable Diffusion 2 and StableSR at 768 px are v models."""


def prediction_from_name(name: str) -> Prediction | None:
    """What the name of a released file, or one like it, says."""
    for pattern, prediction in NAMES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return Prediction(prediction, f"by the file name {name}", True)
    return None


@torch.no_grad()
def measure_prediction(unet: UNet2DConditionModel) -> Prediction | None:
    """What the weights themselves do with pure noise, or None if they are not those of a trained model.

    At the last timestep x is all noise: an epsilon model returns it, a velocity model returns the picture it expects,
    with hardly any of x. At an early timestep both know noise when they see it, since v = sqrt(a) eps - sqrt(1 - a) x0
    (Salimans and Ho 2022, app. D); an untrained network does not.
    """
    alphas_cumprod = SpacedDDPMScheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, unet.config.in_channels, 16, 16, generator=generator)
    context = torch.zeros(4, 77, unet.config.cross_attention_dim, dtype=unet.dtype)

    def response(timestep: int) -> tuple[float, float]:
        """(regression coefficient, correlation) of the output with the noise, where nothing but noise is in x."""
        x = (1 - alphas_cumprod[timestep]).sqrt() * noise
        output = unet(x.to(unet.dtype), timestep, context).sample.float().flatten()
        both = torch.stack([output, noise.flatten()])
        return (both.prod(dim=0).sum() / noise.square().sum()).item(), torch.corrcoef(both)[0, 1].item()

    last, _ = response(999)
    if last > 0.8:
        return Prediction("epsilon", "measured: the UNet returns pure noise as it is", True)
    _, early = response(200)
    if abs(last) < 0.4 and early > 0.4:
        return Prediction("v_prediction", "measured: the UNet makes a picture of pure noise", True)
    return None


ASSUMED = Prediction("epsilon", "give prediction_type (--prediction-type) if it predicts the velocity", False)
