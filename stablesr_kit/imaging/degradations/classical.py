"""Degrading once: I_l = {[(I_h (x) k) down_r + n] JPEG_q} up_r, the model of the blind face-restoration papers.

Li et al. 2020 (DFDNet), Wang et al. 2021 (GFP-GAN), Zhou et al. 2022 (CodeFormer). Pictures
are (B, 3, H, W) in [0, 1] here. Every picture of a batch is drawn for itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations.checks import check_odd_sizes, check_probability, check_span
from stablesr_kit.imaging.degradations.colour import jitter_colours, shift_channels
from stablesr_kit.imaging.degradations.draws import Span, chance, pick, uniform
from stablesr_kit.imaging.degradations.filtering import filter2d
from stablesr_kit.imaging.degradations.jpeg import jpeg
from stablesr_kit.imaging.degradations.kernels import gaussian_kernel
from stablesr_kit.imaging.degradations.noise import add_gaussian_noise, to_grey
from stablesr_kit.imaging.degradations.resizing import ResizeMode, resize
from stablesr_kit.imaging.degradations.strokes import draw_stroke_mask


@dataclass(frozen=True, kw_only=True)
class ClassicalConfig:
    """Settings of the one-pass model: ranges that each picture's kernel, r, n and q are drawn from."""

    kernel_size: int = 41
    """Side of the Gaussian kernel k, odd, in pixels."""
    blur_sigma: Span | None = (0.1, 15.0)
    """Deviation of k along each axis, in pixels; None: no blur."""
    isotropic_probability: float = 0.5
    """How often k is round; otherwise elongated and turned by any angle."""
    downsample: Span = (0.8, 32.0)
    """The factor r."""
    down_modes: tuple[ResizeMode, ...] = ("bilinear",)
    """Ways of making the picture smaller, equally likely."""
    antialias: bool = False
    """Whether bilinear and bicubic reduction weigh all pixels (see `resize`)."""
    noise_sigma: Span = (0.0, 20.0)
    """Deviation of the Gaussian noise n, in levels of 255."""
    jpeg_quality: Span | None = (30.0, 100.0)
    """The quality q, rounded down; None: no JPEG."""
    up_mode: ResizeMode = "bilinear"
    """Way of enlarging the picture to its first size."""
    stroke_probability: float = 0.0
    """How often white brush strokes hide parts of the picture."""
    shift_probability: float = 0.0
    """How often each channel is shifted by up to 20 levels of 255."""
    grey_probability: float = 0.0
    """How often the picture loses its colour."""
    grey_target: bool = False
    """Whether the target loses its colour with the picture."""
    jitter_probability: float = 0.0
    """How often brightness, contrast, saturation and hue are changed."""
    clean_probability: float = 0.0
    """How often a whole batch is not degraded at all."""
    sharpen_target: bool = False
    """Whether the high-quality picture is sharpened first, as target and as what is degraded."""

    def __post_init__(self) -> None:
        check_odd_sizes("kernel_size", (self.kernel_size, self.kernel_size))
        if self.blur_sigma is not None:
            check_span("blur_sigma", self.blur_sigma, 0.01)
        check_span("downsample", self.downsample, 0.01)
        check_span("noise_sigma", self.noise_sigma, 0)
        if self.jpeg_quality is not None:
            check_span("jpeg_quality", self.jpeg_quality, 1, 100)
        if not self.down_modes:
            raise ConfigError("down_modes is empty; name at least one of area, bilinear, bicubic")
        for name in ("isotropic", "stroke", "shift", "grey", "jitter", "clean"):
            check_probability(f"{name}_probability", getattr(self, f"{name}_probability"))


def degrade_classical(image: Tensor, config: ClassicalConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """(low quality, is grey): pictures (B, 3, H, W) in [0, 1], rounded to 8 bit, and which lost colour, (B,)."""
    pictures, are_grey = [], []
    for picture in image.split(1):
        is_grey = chance(config.grey_probability, generator)
        picture = _degraded_structure(picture, config, generator)
        if chance(config.stroke_probability, generator):
            mask = draw_stroke_mask(picture.shape[-2], picture.shape[-1], generator)
            picture = torch.maximum(picture, mask.to(picture))
        if chance(config.shift_probability, generator):
            picture = shift_channels(picture, 20 / 255, generator)
        if is_grey:
            picture = to_grey(picture).expand_as(picture)
        if chance(config.jitter_probability, generator):
            picture = jitter_colours(picture, generator)
        pictures.append(_rounded(picture))
        are_grey.append(is_grey)
    return torch.cat(pictures), torch.tensor(are_grey, device=image.device)


def _degraded_structure(image: Tensor, config: ClassicalConfig, generator: Generator) -> Tensor:
    height, width = image.shape[-2:]
    if config.blur_sigma is not None:
        image = filter2d(image, _draw_kernel(config.kernel_size, config.blur_sigma, config, generator))
    r = uniform(config.downsample, generator)
    mode = config.down_modes[pick((1.0,) * len(config.down_modes), generator)]
    small = (max(1, int(height // r)), max(1, int(width // r)))
    image = resize(image, small, mode, antialias=config.antialias)
    sigma = torch.tensor([uniform(config.noise_sigma, generator) / 255])
    image = add_gaussian_noise(image, sigma, torch.tensor([False]), generator)
    if config.jpeg_quality is not None:
        image = jpeg(image, float(int(uniform(config.jpeg_quality, generator))))
    return resize(image, (height, width), config.up_mode)


def _draw_kernel(size: int, sigma: Span, config: ClassicalConfig, generator: Generator) -> Tensor:
    sigma_x = uniform(sigma, generator)
    if chance(config.isotropic_probability, generator):
        return gaussian_kernel(size, sigma_x, sigma_x)
    return gaussian_kernel(size, sigma_x, uniform(sigma, generator), uniform((-math.pi, math.pi), generator))


def _rounded(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255) / 255
