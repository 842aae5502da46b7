"""Colour fix: the restored picture gets the colours of the LQ picture, and none if that one is grey.

The fixes act on whole pictures, never per tile. They take and return images, (B, 3, H, W) or read by regions, float, in
[-1, 1] or beyond: results are not clamped. They compute in float32 and return the dtype of the image. Wang et al. 2023
(StableSR), section 3.4, describes the first two; the third is that of InvSR (Yue et al. 2025).

A picture is grey by its content, not by its file: a black-and-white picture may be an RGB JPEG, a palette or grey. A
tint, however faint, is a colour and stays."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.canvas import BAND_ROWS, Readable, Region, View, assembled, bands

ColorFix = Literal["wavelet", "adain", "ycbcr", "none"]

LEVELS = 5
REACH = 2**LEVELS - 1  # pixels that a low frequency comes from, on each side
FLAT_RADIUS = 31  # more than a block of JPEG at scale 4
FLAT_FADE = 15
FLAT_RANGE = 1.5  # 8-bit levels: one, and what enlarging rounds
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def color_fixed(image: Readable, reference: Readable, method: ColorFix) -> Readable:
    """The image (3, H, W) with the colours of the reference, computed when read; `none` changes nothing."""
    if method == "wavelet":
        return FlatKept(WaveletFixed(image, reference), reference)
    if method == "adain":
        return FlatKept(AdainFixed(image, reference), reference)
    if method == "ycbcr":
        return FlatKept(YCbCrFixed(image, reference), reference)
    if method == "none":
        return image
    raise ImageError(f"color_fix={method!r} is not known; use 'wavelet', 'adain', 'ycbcr' or 'none'")


def wavelet_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """`WaveletFixed` of a batch (B, 3, H, W)."""
    _check_same_shape(image, reference)
    return torch.cat([assembled(WaveletFixed(*pair)) for pair in _pairs(image, reference)])


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """`AdainFixed` of a batch (B, 3, H, W)."""
    _check_same_shape(image, reference)
    return torch.cat([assembled(AdainFixed(*pair)) for pair in _pairs(image, reference)])


def ycbcr_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """`YCbCrFixed` of a batch (B, 3, H, W)."""
    _check_same_shape(image, reference)
    return torch.cat([assembled(YCbCrFixed(*pair)) for pair in _pairs(image, reference)])


class WaveletFixed:
    """The high frequencies of the image on the low frequencies of the reference, pixel by pixel.

    The decomposition is linear, so high(image) + low(reference) = image + low(reference - image): one pass, not two.
    """

    def __init__(self, image: Readable, reference: Readable) -> None:
        self.image, self.reference = image, reference
        self.shape = image.shape

    def read(self, region: Region) -> Tensor:
        """Values (1, 3, h, w) of a region, computed with its true surroundings, so that regions have no borders."""
        outer = region.grown(REACH, *self.shape[1:])
        image = self.image.read(outer)
        single = image.float()
        _, low = wavelet_decomposition(self.reference.read(outer).to(single) - single)
        return (region.cut_from(single, outer) + region.cut_from(low, outer)).to(image.dtype)


class AdainFixed:
    """The image with each channel's mean and standard deviation replaced by the reference's (Huang & Belongie 2017).

    Both pictures are read once at the start.
    """

    def __init__(self, image: Readable, reference: Readable) -> None:
        self.image = image
        self.shape = image.shape
        self.mean, self.std = _channel_statistics(image)
        self.reference_mean, self.reference_std = _channel_statistics(reference)

    def read(self, region: Region) -> Tensor:
        """Values (1, 3, h, w) of a region."""
        image = self.image.read(region)
        mean, std, reference_mean, reference_std = (
            value.to(image.device) for value in (self.mean, self.std, self.reference_mean, self.reference_std)
        )
        return ((image.float() - mean) / std * reference_std + reference_mean).to(image.dtype)


class YCbCrFixed:
    """The luma of the image with the chroma of the reference, pixel by pixel.

    Changing only luma adds the same to red, green and blue, for any range and offset of Y, Cb and Cr.
    """

    def __init__(self, image: Readable, reference: Readable) -> None:
        self.image, self.reference = image, reference
        self.shape = image.shape

    def read(self, region: Region) -> Tensor:
        """Values (1, 3, h, w) of a region."""
        image = self.image.read(region)
        single = image.float()
        reference = self.reference.read(region).to(single)
        luma = torch.einsum("bchw,c->bhw", single - reference, single.new_tensor(LUMA))
        return (reference + luma[:, None]).to(image.dtype)


class FlatKept:
    """The image (3, H, W), and the reference instead where that is flat, as white paper is: networks mottle it.

    The reference is flat where it varies by at most one 8-bit level within `FLAT_RADIUS` pixels; over `FLAT_FADE` more
    it goes over into the image, which keeps its bits elsewhere.
    """

    def __init__(self, image: Readable, reference: Readable) -> None:
        self.image, self.reference = image, reference
        self.shape = image.shape

    def read(self, region: Region) -> Tensor:
        """Values (1, 3, h, w) of a region."""
        image = self.image.read(region)
        outer = region.grown(FLAT_RADIUS + FLAT_FADE, *self.shape[1:])
        reference = self.reference.read(outer).to(image.device, torch.float32)
        if (share := flat_share(reference)) is None:
            return image
        share, reference = region.cut_from(share, outer), region.cut_from(reference, outer)
        mixed = image.float() + share * (reference - image.float())
        return torch.where(share > 0, mixed.to(image.dtype), image)


def flat_share(reference: Tensor) -> Tensor | None:
    """Share (1, 1, H, W), 0 to 1, of flat positions around each one; None if nothing is flat. See `FlatKept`."""
    block = FLAT_RADIUS  # one lies in every window, and most pictures have no flat one
    if not _is_flat(*(F.max_pool2d(one, block, ceil_mode=True) for one in (reference, -reference))).any():
        return None
    highest, lowest = (_highest(_highest(one, 2), 3) for one in (reference, -reference))
    share = _is_flat(highest, lowest).float()
    for kernel in ((1, 2 * FLAT_FADE + 1), (2 * FLAT_FADE + 1, 1)):
        share = F.avg_pool2d(share, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    return share


def _highest(values: Tensor, dim: int) -> Tensor:
    """The highest value within `FLAT_RADIUS` positions of each one along a dimension, by windows of doubled length."""
    sides = (0, 0, FLAT_RADIUS, FLAT_RADIUS) if dim == 2 else (FLAT_RADIUS, FLAT_RADIUS, 0, 0)
    values, length, wanted = F.pad(values, sides, mode="replicate"), 1, 2 * FLAT_RADIUS + 1
    while length < wanted:
        step = min(length, wanted - length)
        count = values.shape[dim] - step
        values = torch.maximum(values.narrow(dim, 0, count), values.narrow(dim, step, count))
        length += step
    return values


def _is_flat(highest: Tensor, lowest: Tensor) -> Tensor:
    """Whether values reach no further than `FLAT_RANGE`; lowest: negated."""
    return (highest + lowest).amax(1, keepdim=True) * 127.5 <= FLAT_RANGE


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


def _channel_statistics(image: Readable) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) of each channel; the variance is unbiased and raised by 1e-5.

    Sums are in float64, which is exact enough for float32 results.
    """
    channels, height, width = image.shape
    sums, squares = torch.zeros(2, 1, channels, 1, 1, dtype=torch.float64)
    for band in bands(image):
        values = image.read(band).double()
        sums += values.sum((-2, -1), keepdim=True).cpu()
        squares += values.square().sum((-2, -1), keepdim=True).cpu()
    count = height * width
    mean = sums / count
    variance = (squares / count - mean**2).clamp(min=0) * (count / max(count - 1, 1))  # one pixel has variance 0
    return mean.float(), (variance + 1e-5).sqrt().float()


def _pairs(image: Tensor, reference: Tensor) -> list[tuple[View, View]]:
    return [(View(one), View(other)) for one, other in zip(image.split(1), reference.split(1), strict=True)]


def _check_same_shape(image: Tensor, reference: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or image.shape != reference.shape:
        raise ImageError(
            f"colour fix got an image {tuple(image.shape)} and a reference {tuple(reference.shape)}; "
            "both must be (B, 3, H, W) of one size: resize the reference first"
        )


TINT = 1.0
"""Mean chroma of a picture above which it is tinted."""
BLOCK = 16
PATCH = 4.0
"""Mean chroma of a 16 x 16 block above which it is coloured; noise, also of JPEG, stays below."""
STRAY = 24.0
"""Chroma that only a few pixels of a grey picture exceed."""
STRAY_SHARE = 1e-3


def is_neutral(image: Readable) -> bool:
    """Whether the image (3, H, W) in [-1, 1] is grey, apart from noise.

    Its chroma (Cb and Cr of Rec. 601, in 8-bit levels) has a mean of at most 1 over the picture, of at most 4 over
    every block of 16 x 16 pixels, and exceeds 24 in at most one pixel of a thousand.
    """
    _, height, width = image.shape
    total = torch.zeros(2, dtype=torch.float64)
    stray = 0
    for band in bands(image, BAND_ROWS):
        chroma = _chroma(image.read(band))
        block = (min(BLOCK, height), min(BLOCK, width))
        if band.height >= block[0] and F.avg_pool2d(chroma, block).abs().max() > PATCH:
            return False
        total += chroma.sum((0, 2, 3), dtype=torch.float64)
        stray += int((chroma.abs().amax(1) > STRAY).sum())
    pixels = height * width
    return bool((total / pixels).abs().max() <= TINT) and stray <= STRAY_SHARE * pixels


def neutral_like(restored: Readable, lq: Readable) -> Readable:
    """The restored image, without colours if the picture that it was made from, of any size, has none."""
    return Neutral(restored) if is_neutral(lq) else restored


@dataclass(frozen=True)
class Neutral:
    """The image (3, H, W) without colours: its luma in all three channels, computed when read."""

    image: Readable

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image.shape

    def read(self, region: Region) -> Tensor:
        """Values (1, 3, h, w) of a region."""
        values = self.image.read(region)
        red, green, blue = values.float().split(1, dim=1)
        luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        return luma.to(values.dtype).expand(-1, 3, -1, -1)


def _chroma(image: Tensor) -> Tensor:
    """Cb and Cr (1, 2, h, w) of an image (1, 3, h, w) in [-1, 1], in 8-bit levels around 0."""
    red, green, blue = (image.float().cpu() * 127.5).split(1, dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return torch.cat([(blue - luma) / (2 * (1 - LUMA[2])), (red - luma) / (2 * (1 - LUMA[0]))], dim=1)
