"""Blur kernels: float64 tensors (size, size), indexed [y, x], that sum to one.

The families are those of blind super-resolution: Gaussian, generalised Gaussian and plateau (Liu et al. 2020,
"Estimating generalized Gaussian blur kernels for out-of-focus image deblurring"; Wang et al. 2021, "Real-ESRGAN"),
and the circular sinc low-pass that stands for ringing (Real-ESRGAN).
"""

import math

import torch
from torch import Tensor


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
    return torch.nn.functional.pad(kernel, (margin, margin, margin, margin))


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
