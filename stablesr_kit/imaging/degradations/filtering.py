"""Filtering with a kernel per image, and the sharpening that StableSR's 512 model learned its targets with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.degradations.kernels import gaussian_kernel

SHARPENING_KERNEL_SIZE = 51
SHARPENING_SIGMA = 8.0


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
