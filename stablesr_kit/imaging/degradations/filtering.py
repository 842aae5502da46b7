"""Blur kernels, filtering with a kernel per picture, sharpening, and resizing.

Kernels are float64 tensors (size, size), indexed [y, x], that sum to one. Their families are those of blind
super-resolution: Gaussian, generalised Gaussian and plateau (Liu et al. 2020, "Estimating generalized Gaussian blur
kernels for out-of-focus image deblurring"; Wang et al. 2021, "Real-ESRGAN"), and the circular sinc low-pass that stands
for ringing (Real-ESRGAN).
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.errors import ImageError

SHARPENING_KERNEL_SIZE = 51
SHARPENING_SIGMA = 8.0

ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> Tensor:
    """exp(-q / 2), q the squared Mahalanobis distance; sigmas in pixels, theta (radians) turns x towards y."""
    return _normalised(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta)))


def generalised_gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, *, beta: float
) -> Tensor:
    """exp(-q^beta / 2): heavier tails than a Gaussian for beta < 1, flatter for beta > 1."""
    return _normalised(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, *, beta: float) -> Tensor:
    """1 / (1 + q^beta): a flat top with slowly falling sides."""
    return _normalised(1 / (1 + _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Ideal circular low-pass, cut off at `cutoff` radians per pixel (pi: nothing is removed along an axis)."""
    x, y = _grid(size)
    radius = torch.hypot(x, y)
    radius[size // 2, size // 2] = 1
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _normalised(kernel)


def delta_kernel(size: int) -> Tensor:
    """The kernel that changes nothing."""
    kernel = torch.zeros(size, size, dtype=torch.float64)
    kernel[size // 2, size // 2] = 1
    return kernel


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """The kernel (k, k) in the middle of zeros (size, size); both sizes odd."""
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


def filter2d(image: Tensor, kernels: Tensor) -> Tensor:
    """Correlate each picture of (B, C, H, W) with its kernel of (B, k, k), or all with one kernel (k, k); k odd.

    The border is mirrored without repeating the edge. Computed by FFT in float32: the cost hardly depends on k.
    Raises ImageError where the picture is too small to be mirrored.
    """
    height, width = image.shape[-2:]
    margin = kernels.shape[-1] // 2
    if min(height, width) <= margin:
        raise ImageError(
            f"a picture of {height}x{width} px is too small for a blur kernel of {kernels.shape[-1]} px; "
            f"give at least {margin + 1} px per side"
        )
    padded = F.pad(image.float(), (margin, margin, margin, margin), mode="reflect")
    grid = [_fft_size(height + 2 * margin), _fft_size(width + 2 * margin)]
    response = torch.fft.rfft2(kernels.to(padded).flip(-1, -2), s=grid)
    spectrum = torch.fft.rfft2(padded, s=grid) * (response[:, None] if response.ndim == 3 else response)
    filtered = torch.fft.irfft2(spectrum, s=grid)
    return filtered[..., 2 * margin : 2 * margin + height, 2 * margin : 2 * margin + width].to(image.dtype)


def usm_sharpen(image: Tensor, weight: float = 0.5, threshold: float = 10.0) -> Tensor:
    """Unsharp-masked picture, (B, C, H, W) in [0, 1]: what Real-ESRGAN and StableSR (512) use as target.

    The residual over a Gaussian blur (51 px, sigma 8) is added with `weight` where it exceeds `threshold` (in
    levels of 255), and the mask is blurred so that its edge does not show. Sides of at least 26 px.
    """
    blur = gaussian_kernel(SHARPENING_KERNEL_SIZE, SHARPENING_SIGMA, SHARPENING_SIGMA)
    residual = image - filter2d(image, blur)
    mask = filter2d((residual.abs() * 255 > threshold).to(image.dtype), blur)
    sharp = (image + weight * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * image


def resize(image: Tensor, size: tuple[int, int], mode: ResizeMode, *, antialias: bool = False) -> Tensor:
    """The picture (B, C, H, W) at `size` (height, width).

    antialias widens bilinear and bicubic to the new pixel's footprint, as image editors do; without it they take
    2 or 4 neighbours per axis and alias, as real pipelines often do. "area" never aliases. Bicubic may overshoot.
    """
    if mode == "area":
        return F.interpolate(image, size, mode=mode)
    return F.interpolate(image, size, mode=mode, antialias=antialias)


def rescale(image: Tensor, factor: float, mode: ResizeMode) -> Tensor:
    """The picture times `factor`, floor(side * factor) per side, sampled at exactly 1 / factor pixels."""
    return F.interpolate(image, scale_factor=factor, mode=mode)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _squared_distance(size: int, sigma_x: float, sigma_y: float, theta: float) -> Tensor:
    x, y = _grid(size)
    cos, sin = math.cos(theta), math.sin(theta)
    along, across = cos * x + sin * y, cos * y - sin * x
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalised(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()


def _fft_size(length: int) -> int:
    """The next length whose only prime factors are 2, 3 and 5, for which an FFT is fast."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1
