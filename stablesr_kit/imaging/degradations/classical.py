"""One-pass degradation: I_l = {[(I_h (x) k) down_r + n] JPEG_q} up_r, the model of blind face restoration.

Li et al. 2020 (DFDNet), Wang et al. 2021 (GFP-GAN), Zhou et al. 2022 (CodeFormer); with the colour changes of
CodeFormer's colourisation, and the brush strokes of its inpainting (free-form masks, Yu et al. 2019). Pictures are
(B, 3, H, W) in [0, 1] here. Each picture of a batch has its own draws.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations.draws import (
    Span,
    add_gaussian_noise,
    chance,
    check_odd_sizes,
    check_probability,
    check_span,
    pick,
    to_grey,
    uniform,
    uniform_each,
)
from stablesr_kit.imaging.degradations.filtering import ResizeMode, filter2d, gaussian_kernel, resize
from stablesr_kit.imaging.degradations.jpeg import jpeg

BRIGHTNESS: Span = (0.5, 1.5)
CONTRAST: Span = (0.5, 1.5)
SATURATION: Span = (0.0, 1.5)
HUE: Span = (-0.1, 0.1)

STROKES = (1, 3)
STEPS = (8, 27)
STROKE_WIDTH_PX: Span = (30.0, 70.0)


@dataclass(frozen=True, kw_only=True)
class ClassicalConfig:
    """Settings of the one-pass model: ranges that each picture's kernel, r, n and q are drawn from."""

    kernel_size: int = 41
    """Side of the Gaussian kernel k, odd, in pixels."""
    blur_sigma: Span | None = (0.1, 15.0)
    """Deviation of k along each axis, in pixels; None: no blur."""
    isotropic_probability: float = 0.5
    """Probability that k is round; otherwise it is elongated and rotated by any angle."""
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
    """Probability that white brush strokes hide parts of the picture."""
    shift_probability: float = 0.0
    """Probability that each channel is shifted by up to 20 levels of 255."""
    grey_probability: float = 0.0
    """Probability that the picture becomes grey."""
    grey_target: bool = False
    """Whether the target becomes grey with the picture."""
    jitter_probability: float = 0.0
    """Probability that brightness, contrast, saturation and hue are changed."""
    clean_probability: float = 0.0
    """Probability that a whole batch is not degraded."""
    sharpen_target: bool = False
    """Whether the HQ picture is sharpened first, both as target and as source."""

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


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """One line of the brush."""

    corners: tuple[tuple[int, int], ...]
    """(y, x) of each corner, in pixels."""
    width_px: int
    """Width of the line; every corner is a disc as wide."""


def draw_stroke_mask(height: int, width: int, generator: Generator) -> Tensor:
    """Mask (1, height, width) on the generator's device: 1 under the strokes, 0 elsewhere.

    One to three zigzag strokes with round joints, whose steps scale with the picture and whose width is 30 to 70 px:
    those that CodeFormer's inpainting model (512 px) was trained with.
    """
    strokes = [
        Stroke(corners=_zigzag(height, width, generator), width_px=int(uniform(STROKE_WIDTH_PX, generator)))
        for _ in range(_whole(STROKES, generator))
    ]
    return paint_strokes(height, width, strokes).to(generator.device)


def paint_strokes(height: int, width: int, strokes: Iterable[Stroke]) -> Tensor:
    """Mask (1, height, width): 1 under the strokes, 0 elsewhere."""
    mask = Image.new("L", (width, height))
    brush = ImageDraw.Draw(mask)
    for stroke in strokes:
        radius = stroke.width_px // 2
        brush.line([(x, y) for y, x in stroke.corners], fill=1, width=stroke.width_px)
        for y, x in stroke.corners:
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return torch.from_numpy(np.array(mask, np.float32))[None]


def _zigzag(height: int, width: int, generator: Generator) -> tuple[tuple[int, int], ...]:
    """Corners (y, x) of one stroke: it swings to and fro by about 2/5 of a turn, in steps of an eighth picture."""
    mean_turn = 2 * math.pi / 5
    turns = (
        mean_turn - uniform((0.0, math.pi / 6), generator),
        mean_turn + uniform((0.0, math.pi / 6), generator),
    )
    typical = math.hypot(height, width) / 8
    corners = [(_whole((0, height - 1), generator), _whole((0, width - 1), generator))]
    for index in range(_whole(STEPS, generator)):
        angle = uniform(turns, generator)
        angle = 2 * math.pi - angle if index % 2 == 0 else angle
        normal = torch.randn((), generator=generator, device=generator.device).item()
        length = min(max(typical * (1 + normal / 2), 0.0), 2 * typical)
        y, x = corners[-1]
        y = int(min(max(y + length * math.sin(angle), 0.0), height))
        x = int(min(max(x + length * math.cos(angle), 0.0), width))
        corners.append((y, x))
    return tuple(corners)


def _whole(limits: tuple[int, int], generator: Generator) -> int:
    return int(uniform((limits[0], limits[1] + 1), generator))
