"""Give a restored picture the colours of the picture it was made from; always on the whole picture, never per tile.

Both fixes take and return images (B, 3, H, W), float, in [-1, 1] or beyond: results are not clamped. They compute in
float32 and return the dtype of `image`. Wang et al. 2023 (StableSR), section 3.4, describes both.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.errors import ImageError

ColorFix = Literal["wavelet", "adain", "none"]

LEVELS = 5
BAND = 512  # rows computed at once


def apply_color_fix(image: Tensor, reference: Tensor, method: ColorFix) -> Tensor:
    """The image with the colours of the reference; `none` returns the image as it is."""
    if method == "wavelet":
        return wavelet_color_fix(image, reference)
    if method == "adain":
        return adain_color_fix(image, reference)
    if method == "none":
        return image
    raise ImageError(f"color_fix={method!r} is not known; use 'wavelet', 'adain' or 'none'")


def wavelet_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """The high frequencies of the image on the low frequencies of the reference, pixel by pixel.

    The decomposition is linear, so high(image) + low(reference) = image + low(reference - image): one pass, not two.
    """
    _check_same_shape(image, reference)
    height, reach = image.shape[-2], 2**LEVELS - 1
    fixed = torch.empty_like(image)
    for top in range(0, height, BAND):  # with their true surroundings, so the bands do not show
        bottom, first, last = min(top + BAND, height), max(top - reach, 0), min(top + BAND + reach, height)
        _, low = wavelet_decomposition(reference[..., first:last, :].float() - image[..., first:last, :].float())
        fixed[..., top:bottom, :] = image[..., top:bottom, :].float() + low[..., top - first : bottom - first, :]
    return fixed


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """The image with each channel's mean and standard deviation replaced by the reference's (Huang & Belongie 2017)."""
    _check_same_shape(image, reference)
    mean, std = _channel_statistics(image.float())
    reference_mean, reference_std = _channel_statistics(reference.float())
    return ((image.float() - mean) / std * reference_std + reference_mean).to(image.dtype)


def wavelet_decomposition(image: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """High and low frequencies of a float32 image; they sum to it. Level i blurs with a radius of 2**i pixels."""
    low = image
    for level in range(levels):
        low = blur(low, radius=2**level)
    return image - low, low


def blur(image: Tensor, radius: int) -> Tensor:
    """The image filtered by [1 2 1; 2 4 2; 1 2 1] / 16 with taps `radius` pixels apart; edge pixels are repeated.

    The kernel is separable: rows, then columns, as sums of three shifted views.
    """
    padded = F.pad(image, (0, 0, radius, radius), mode="replicate")
    rows = (padded[..., : -2 * radius, :] + padded[..., 2 * radius :, :]) / 4 + image / 2
    padded = F.pad(rows, (radius, radius, 0, 0), mode="replicate")
    return (padded[..., : -2 * radius] + padded[..., 2 * radius :]) / 4 + rows / 2


def _channel_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, 3, 1, 1) of each channel; the variance is unbiased and raised by 1e-5."""
    unbiased = int(image.shape[-2] * image.shape[-1] > 1)  # one pixel has variance 0, not 0 / 0
    variance, mean = torch.var_mean(image, dim=(-2, -1), correction=unbiased, keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def _check_same_shape(image: Tensor, reference: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or image.shape != reference.shape:
        raise ImageError(
            f"colour fix got an image {tuple(image.shape)} and a reference {tuple(reference.shape)}; "
            "both must be (B, 3, H, W) of one size: resize the reference first"
        )
