"""Colour changes that the face degradations draw from, on pictures (B, 3, H, W) in [0, 1]."""

import torch
from torch import Generator, Tensor

from stablesr_kit.imaging.degradations.draws import Span, uniform, uniform_each
from stablesr_kit.imaging.degradations.noise import to_grey

BRIGHTNESS: Span = (0.5, 1.5)
CONTRAST: Span = (0.5, 1.5)
SATURATION: Span = (0.0, 1.5)
HUE: Span = (-0.1, 0.1)


def shift_channels(image: Tensor, largest: float, generator: Generator) -> Tensor:
    """Every channel of every picture plus its own constant from [-largest, largest], clamped."""
    batch, channels = image.shape[:2]
    shift = uniform_each((-largest, largest), batch * channels, generator).to(image)
    return (image + shift.view(batch, channels, 1, 1)).clamp(0, 1)


def jitter_colours(image: Tensor, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed by random amounts in random order (CodeFormer's ranges)."""
    for step in torch.randperm(4, generator=generator, device=generator.device).tolist():
        if step == 0:
            image = (image * uniform(BRIGHTNESS, generator)).clamp(0, 1)
        elif step == 1:
            image = blend(image, to_grey(image).mean((1, 2, 3), keepdim=True), uniform(CONTRAST, generator))
        elif step == 2:
            image = blend(image, to_grey(image), uniform(SATURATION, generator))
        else:
            image = turn_hue(image, uniform(HUE, generator))
    return image


def blend(image: Tensor, other: Tensor, weight: float) -> Tensor:
    """weight * image + (1 - weight) * other, clamped."""
    return (weight * image + (1 - weight) * other).clamp(0, 1)


def turn_hue(image: Tensor, turn: float) -> Tensor:
    """Hues moved round the HSV circle by `turn` of a whole turn; value and saturation stay."""
    value, smallest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    chroma = value - smallest
    red, green, blue = image.split(1, dim=1)
    safe = chroma.clamp_min(torch.finfo(image.dtype).tiny)
    sector = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # An HSV colour's channel lies `chroma` below the value except near its own hue (Smith 1978).
    offset = torch.tensor([5.0, 3.0, 1.0]).to(image).view(3, 1, 1)
    distance = (offset + sector + 6 * turn) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)
