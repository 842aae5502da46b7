"""Random choices and noise from an explicit generator, on its device, and checks of their parameters.

Noise is sensor noise on pictures (B, 3, H, W) in [0, 1], each with its own strength. Results are clamped.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError

Span = tuple[float, float]
GREY_WEIGHTS = (0.2989, 0.587, 0.114)


def uniform(span: Span, generator: Generator) -> float:
    """One number from [span[0], span[1])."""
    low, high = span
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def uniform_each(span: Span, count: int, generator: Generator) -> Tensor:
    """`count` independent numbers from [span[0], span[1]), shape (count,), on the generator's device."""
    low, high = span
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def chance(probability: float, generator: Generator) -> bool:
    """True with the given probability."""
    return uniform((0.0, 1.0), generator) < probability


def pick(weights: Sequence[float], generator: Generator) -> int:
    """An index, drawn in proportion to its weight; the weights need not sum to one."""
    point = uniform((0.0, float(sum(weights))), generator)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def odd_size(sizes: tuple[int, int], generator: Generator) -> int:
    """An odd number from sizes[0] to sizes[1], both odd and both possible."""
    smallest, largest = sizes
    return smallest + 2 * int(uniform((0.0, (largest - smallest) // 2 + 1), generator))


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


def check_probability(name: str, value: float) -> None:
    """Raise ConfigError unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} is no probability; give a number from 0 to 1")


def check_span(name: str, span: Span, lowest: float, highest: float = float("inf")) -> None:
    """Raise ConfigError unless lowest <= span[0] <= span[1] <= highest."""
    if not lowest <= span[0] <= span[1] <= highest:
        raise ConfigError(f"{name}={span} must be (low, high) with {lowest} <= low <= high <= {highest}")


def check_odd_sizes(name: str, sizes: tuple[int, int]) -> None:
    """Raise ConfigError unless both sizes are odd, positive and in ascending order."""
    if sizes[0] % 2 == 0 or sizes[1] % 2 == 0 or not 1 <= sizes[0] <= sizes[1]:
        raise ConfigError(f"{name}={sizes} must be (smallest, largest), both odd, such as (7, 21)")


def _shot_noise(image: Tensor, generator: Generator) -> Tensor:
    levels = (image * 255).round().clamp(0, 255)
    counts = [int(torch.unique(picture).numel()) for picture in levels]
    peak = levels.new_tensor([2.0 ** (n - 1).bit_length() for n in counts]).view(-1, 1, 1, 1)
    value = levels / 255
    rate = (value * peak).to(generator.device, torch.float32)
    return torch.poisson(rate, generator=generator).to(image) / peak - value


def _per_picture(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image.device).view(-1, 1, 1, 1)
