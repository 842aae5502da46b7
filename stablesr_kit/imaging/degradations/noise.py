"""Sensor-like noise on pictures (B, 3, H, W) in [0, 1]; each picture has its own strength. Results are clamped."""

import torch
from torch import Generator, Tensor

GREY_WEIGHTS = (0.2989, 0.587, 0.114)


def to_grey(image: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of an RGB picture (ITU-R BT.601 weights)."""
    return (image * image.new_tensor(GREY_WEIGHTS).view(3, 1, 1)).sum(1, keepdim=True)


def add_gaussian_noise(image: Tensor, sigma: Tensor, is_grey: Tensor, generator: Generator) -> Tensor:
    """White noise of deviation `sigma` (B,), in units of the range [0, 1].

    Where is_grey (B,) holds, the three channels share one noise field.
    """
    shape = (image.shape[0], 4, *image.shape[2:])
    fields = torch.randn(shape, generator=generator, device=generator.device).to(image)
    noise = torch.where(_per_picture(is_grey, image), fields[:, 3:], fields[:, :3])
    return (image + noise * _per_picture(sigma, image)).clamp(0, 1)


def add_poisson_noise(image: Tensor, scale: Tensor, is_grey: Tensor, generator: Generator) -> Tensor:
    """Shot noise times `scale` (B,); where is_grey (B,) holds, the three channels share that of the luma.

    One photon count corresponds to 1 / 2^ceil(log2(n)), n being the number of different 8-bit levels in the picture
    (Real-ESRGAN's rule): the noise has mean zero and variance scale^2 * value / 2^ceil(log2(n)).
    """
    colour = _shot_noise(image, generator)
    grey = _shot_noise(to_grey(image), generator)
    noise = torch.where(_per_picture(is_grey, image), grey, colour)
    return (image + noise * _per_picture(scale, image)).clamp(0, 1)


def _shot_noise(image: Tensor, generator: Generator) -> Tensor:
    levels = (image * 255).round().clamp(0, 255)
    counts = [int(torch.unique(picture).numel()) for picture in levels]
    peak = levels.new_tensor([2.0 ** (n - 1).bit_length() for n in counts]).view(-1, 1, 1, 1)
    value = levels / 255
    rate = (value * peak).to(generator.device, torch.float32)
    return torch.poisson(rate, generator=generator).to(image) / peak - value


def _per_picture(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image.device).view(-1, 1, 1, 1)
