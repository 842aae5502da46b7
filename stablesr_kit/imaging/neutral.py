"""Whether a picture is grey: its content decides, not the file it came in.

A black-and-white picture may lie in an RGB JPEG, a palette or a grey file. What a network makes of it has colours,
which are taken out again. A tint, however faint, is a colour of the picture and stays.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.imaging.canvas import BAND_ROWS, Readable, Region, bands

# Rec. 601, as JPEG has it; chroma in 8-bit levels.
LUMA = (0.299, 0.587, 0.114)
TINT = 1.0
"""A mean chroma of the picture above it is a tint."""
BLOCK = 16
PATCH = 4.0
"""A mean chroma of a block of 16 x 16 pixels above it is a coloured thing; noise, also of JPEG, stays below."""
STRAY = 24.0
"""A chroma that pixels of a grey picture reach in some places only."""
STRAY_SHARE = 1e-3


def is_neutral(image: Readable) -> bool:
    """Whether the image (3, H, W) in [-1, 1] is grey but for noise.

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
    """The image (3, H, W) without colours: its luma in all three channels, where it is read."""

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
