"""Two-pass degradation: the model of Real-ESRGAN (Wang et al. 2021) with the settings of StableSR.

Blur, resizing, noise and JPEG are applied twice, for camera and for editing and transmission; then ringing (sinc).
Pictures are (B, 3, H, W) in [0, 1] here. Drawn per picture: kernels, noise strength, JPEG quality. Drawn once per
batch, because the pictures must keep one size: resizing, which noise, whether to blur again, last order.
Unlike in the official code, JPEG is that of a file, not DiffJPEG's (see `jpeg`).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.degradations.draws import (
    Span,
    add_gaussian_noise,
    add_poisson_noise,
    chance,
    check_odd_sizes,
    check_probability,
    check_span,
    odd_size,
    pick,
    uniform,
    uniform_each,
)
from stablesr_kit.imaging.degradations.filtering import (
    RESIZE_MODES,
    delta_kernel,
    filter2d,
    gaussian_kernel,
    generalised_gaussian_kernel,
    pad_kernel,
    plateau_kernel,
    rescale,
    resize,
    sinc_kernel,
)
from stablesr_kit.imaging.degradations.jpeg import jpeg


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """Which kernels blur the picture. The six shapes are drawn in proportion to their weights."""

    size: tuple[int, int] = (7, 21)
    """Smallest and largest kernel, both odd, in pixels."""
    sigma: Span = (0.2, 1.5)
    """Deviation of the bell shapes along each axis, in pixels."""
    sinc_probability: float = 0.1
    """Probability of a sinc low-pass kernel instead of a bell."""
    gaussian_iso: float = 0.45
    """Weight of round Gaussians."""
    gaussian_aniso: float = 0.25
    """Weight of elongated Gaussians, turned by any angle."""
    generalised_iso: float = 0.12
    """Weight of round generalised Gaussians."""
    generalised_aniso: float = 0.03
    """Weight of elongated generalised Gaussians."""
    plateau_iso: float = 0.12
    """Weight of round plateaus."""
    plateau_aniso: float = 0.03
    """Weight of elongated plateaus."""
    generalised_beta: Span = (0.5, 2.0)
    """Exponent of generalised Gaussians: as often below one as above it."""
    plateau_beta: Span = (1.0, 1.5)
    """Exponent of plateaus: as often below one as above it."""

    def __post_init__(self) -> None:
        check_odd_sizes("size", self.size)
        check_probability("sinc_probability", self.sinc_probability)
        check_span("sigma", self.sigma, 0.01)
        check_span("generalised_beta", self.generalised_beta, 0.01)
        check_span("plateau_beta", self.plateau_beta, 0.01)
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigError(f"the kernel weights {self.weights} must not be negative, and one must be positive")

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the six bell shapes, round before elongated."""
        return (
            self.gaussian_iso,
            self.gaussian_aniso,
            self.generalised_iso,
            self.generalised_aniso,
            self.plateau_iso,
            self.plateau_aniso,
        )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How noise is added: one of two kinds."""

    gaussian_probability: float = 0.5
    """Probability of Gaussian noise; otherwise it is Poisson noise."""
    gaussian_sigma: Span = (1.0, 15.0)
    """Deviation of Gaussian noise, in levels of 255."""
    poisson_scale: Span = (0.05, 2.0)
    """Strength of Poisson noise (see `add_poisson_noise`)."""
    grey_probability: float = 0.4
    """Probability that the noise is the same in all channels."""

    def __post_init__(self) -> None:
        check_probability("gaussian_probability", self.gaussian_probability)
        check_probability("grey_probability", self.grey_probability)
        check_span("gaussian_sigma", self.gaussian_sigma, 0)
        check_span("poisson_scale", self.poisson_scale, 0)


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """One of the two passes: blur, resizing, noise."""

    blur: BlurConfig
    """The kernels of this pass."""
    blur_probability: float = 1.0
    """Probability that this pass blurs."""
    up_probability: float
    """Probability that the picture is enlarged."""
    down_probability: float
    """Probability that the picture is reduced; otherwise it keeps its size."""
    resize_range: Span
    """Smallest factor of reduction, largest factor of enlargement."""
    noise: NoiseConfig
    """The noise of this pass."""

    def __post_init__(self) -> None:
        check_probability("blur_probability", self.blur_probability)
        check_probability("up_probability", self.up_probability)
        check_probability("down_probability", self.down_probability)
        check_probability("up_probability + down_probability", self.up_probability + self.down_probability)
        if not 0 < self.resize_range[0] <= 1 <= self.resize_range[1]:
            raise ConfigError(f"resize_range={self.resize_range} must be (low, high) with 0 < low <= 1 <= high")


@dataclass(frozen=True, kw_only=True)
class SecondOrderConfig:
    """Settings of the two-pass model; the defaults are those of StableSR's 512 model."""

    scale: int = 4
    """Factor by which the LQ picture is smaller, before it is enlarged again."""
    first: PassConfig = field(
        default_factory=lambda: PassConfig(
            blur=BlurConfig(),
            up_probability=0.2,
            down_probability=0.7,
            resize_range=(0.3, 1.5),
            noise=NoiseConfig(),
        )
    )
    """First pass; its resizing is relative to the picture."""
    second: PassConfig = field(
        default_factory=lambda: PassConfig(
            blur=BlurConfig(sigma=(0.2, 1.0)),
            blur_probability=0.5,
            up_probability=0.3,
            down_probability=0.4,
            resize_range=(0.6, 1.2),
            noise=NoiseConfig(gaussian_sigma=(1.0, 12.0), poisson_scale=(0.05, 1.0)),
        )
    )
    """Second pass; its resizing is relative to the picture divided by `scale`."""
    first_jpeg_quality: Span = (60.0, 95.0)
    """JPEG quality after the first pass."""
    last_jpeg_quality: Span = (60.0, 100.0)
    """JPEG quality at the end."""
    final_sinc_probability: float = 0.8
    """Probability of a final sinc filter (ringing)."""
    final_sinc_size: tuple[int, int] = (7, 21)
    """Smallest and largest final sinc filter, both odd, in pixels."""
    sinc_first_probability: float = 0.5
    """Probability that the final resizing and sinc come before the last JPEG; otherwise after it."""
    clean_probability: float = 0.01
    """Probability that a whole batch is not degraded."""
    sharpen_target: bool = True
    """Whether the HQ picture is sharpened first, both as target and as source."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ConfigError(f"scale={self.scale} must be a whole number of at least 1, such as 4")
        check_span("first_jpeg_quality", self.first_jpeg_quality, 1, 100)
        check_span("last_jpeg_quality", self.last_jpeg_quality, 1, 100)
        check_probability("final_sinc_probability", self.final_sinc_probability)
        check_odd_sizes("final_sinc_size", self.final_sinc_size)
        check_probability("sinc_first_probability", self.sinc_first_probability)
        check_probability("clean_probability", self.clean_probability)


def degrade_second_order(image: Tensor, config: SecondOrderConfig, generator: Generator) -> Tensor:
    """The small LQ picture (B, 3, H // scale, W // scale) of image (B, 3, H, W), both in [0, 1].

    Raises ImageError if a side is too short for the largest kernel after the strongest reduction.
    """
    batch, _, height, width = image.shape
    small = (height // config.scale, width // config.scale)
    _check_size(height, width, config)

    x = _blurred(image, config.first, generator)
    x = rescale(x, _resize_factor(config.first, generator), RESIZE_MODES[pick((1, 1, 1), generator)])
    x = _noisy(x, config.first.noise, generator)
    x = jpeg(x, uniform_each(config.first_jpeg_quality, batch, generator))

    x = _blurred(x, config.second, generator)
    factor = _resize_factor(config.second, generator)
    size = (int(height / config.scale * factor), int(width / config.scale * factor))
    x = resize(x, size, RESIZE_MODES[pick((1, 1, 1), generator)])
    x = _noisy(x, config.second.noise, generator)

    quality = uniform_each(config.last_jpeg_quality, batch, generator)
    final_mode = RESIZE_MODES[pick((1, 1, 1), generator)]
    final_kernels = torch.stack([_final_kernel(config, generator) for _ in range(batch)])
    if chance(config.sinc_first_probability, generator):
        x = jpeg(filter2d(resize(x, small, final_mode), final_kernels).clamp(0, 1), quality)
    else:
        x = filter2d(resize(jpeg(x, quality), small, final_mode), final_kernels)
    return x.clamp(0, 1)


def draw_blur_kernel(config: BlurConfig, generator: Generator) -> Tensor:
    """A random kernel, padded to the largest size of the config."""
    size = odd_size(config.size, generator)
    if chance(config.sinc_probability, generator):
        lowest_cutoff = math.pi / 3 if size < 13 else math.pi / 5
        return pad_kernel(sinc_kernel(size, uniform((lowest_cutoff, math.pi), generator)), config.size[1])
    shape, is_elongated = divmod(pick(config.weights, generator), 2)
    sigma_x = sigma_y = uniform(config.sigma, generator)
    theta = 0.0
    if is_elongated:
        sigma_y = uniform(config.sigma, generator)
        theta = uniform((-math.pi, math.pi), generator)
    if shape == 0:
        kernel = gaussian_kernel(size, sigma_x, sigma_y, theta)
    elif shape == 1:
        beta = _draw_beta(config.generalised_beta, generator)
        kernel = generalised_gaussian_kernel(size, sigma_x, sigma_y, theta, beta=beta)
    else:
        kernel = plateau_kernel(size, sigma_x, sigma_y, theta, beta=_draw_beta(config.plateau_beta, generator))
    return pad_kernel(kernel, config.size[1])


def _draw_beta(span: Span, generator: Generator) -> float:
    low, high = span
    return uniform((low, 1.0) if chance(0.5, generator) else (1.0, high), generator)


def _final_kernel(config: SecondOrderConfig, generator: Generator) -> Tensor:
    largest = config.final_sinc_size[1]
    if not chance(config.final_sinc_probability, generator):
        return delta_kernel(largest)
    size = odd_size(config.final_sinc_size, generator)
    return pad_kernel(sinc_kernel(size, uniform((math.pi / 3, math.pi), generator)), largest)


def _blurred(x: Tensor, config: PassConfig, generator: Generator) -> Tensor:
    if not chance(config.blur_probability, generator):
        return x
    return filter2d(x, torch.stack([draw_blur_kernel(config.blur, generator) for _ in x]))


def _resize_factor(config: PassConfig, generator: Generator) -> float:
    keep = 1 - config.up_probability - config.down_probability
    case = pick((config.up_probability, config.down_probability, keep), generator)
    low, high = config.resize_range
    return uniform(((1.0, high), (low, 1.0), (1.0, 1.0))[case], generator)


def _noisy(x: Tensor, config: NoiseConfig, generator: Generator) -> Tensor:
    batch = x.shape[0]
    is_gaussian = chance(config.gaussian_probability, generator)
    is_grey = uniform_each((0.0, 1.0), batch, generator) < config.grey_probability
    if is_gaussian:
        sigma = uniform_each(config.gaussian_sigma, batch, generator) / 255
        return add_gaussian_noise(x, sigma, is_grey, generator)
    return add_poisson_noise(x.clamp(0, 1), uniform_each(config.poisson_scale, batch, generator), is_grey, generator)


def _check_size(height: int, width: int, config: SecondOrderConfig) -> None:
    shortest_ever = min(config.first.resize_range[0], 1 / config.scale)
    largest_kernel = max(config.first.blur.size[1], config.second.blur.size[1], config.final_sinc_size[1])
    needed = math.ceil((largest_kernel // 2 + 1) / shortest_ever)
    if min(height, width) < needed:
        raise ImageError(
            f"a picture of {height}x{width} px is too small for this degradation; give at least {needed} px per side"
        )
