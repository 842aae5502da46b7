"""Baseline JPEG with 4:2:0 chroma, coded and decoded at once by tensor arithmetic, so that it runs on any device.

ITU-T T.81 with the tables of its annex K, scaled by quality, chroma averaged and interpolated as libjpeg does; the
entropy coding, being lossless, is left out. No gradient passes the rounding.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
RGB_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
YCBCR_TO_RGB = (
    (1.0, 0.0, 1.402),
    (1.0, -0.344136, -0.714136),
    (1.0, 1.772, 0.0),
)


def jpeg(image: Tensor, quality: Tensor | float, *, official_quirks: bool = False) -> Tensor:
    """The picture as a JPEG file of `quality` (1 to 100, one number or one per picture, shape (B,)) returns it.

    image: (B, 3, H, W), RGB in [0, 1], rounded to 8 bit first; the result holds 8-bit levels. official_quirks gives
    the numbers of the DiffJPEG that Real-ESRGAN and StableSR train with: nothing but coefficients is rounded, the
    luma table is transposed, blocks at the border are filled with black, chroma is repeated, quality 100 is not finite.
    """
    batch, _, height, width = image.shape
    rounded = nn.Identity() if official_quirks else torch.round
    levels = rounded(image.float() * 255)
    if official_quirks:
        levels = F.pad(levels, (0, -width % 16, 0, -height % 16))
    else:
        levels = F.pad(levels, (0, -width % 16, 0, height % 2), mode="replicate")
    ycbcr = rounded(torch.einsum("dc,bchw->bdhw", levels.new_tensor(RGB_TO_YCBCR), levels))
    luma, chroma = ycbcr[:, :1] - 128, F.avg_pool2d(ycbcr[:, 1:], 2)
    if not official_quirks:
        # libjpeg rounds means that lie halfway between two levels down and up in turn.
        columns = torch.arange(chroma.shape[-1], device=chroma.device)
        chroma = (chroma + (columns % 2 + 1) / 4).floor()
    # libjpeg fills up the last row of blocks after the chroma was averaged, but the last column before.
    luma = F.pad(luma, (0, 0, 0, -luma.shape[-2] % 16), mode="replicate")
    chroma = F.pad(chroma, (0, 0, 0, -chroma.shape[-2] % 8), mode="replicate")

    # libjpeg's scaling of the tables: 50/q below quality 50, 2 - q/50 from there.
    quality = torch.as_tensor(quality).to(levels).expand(batch).view(-1, 1, 1, 1, 1, 1)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    luma_step = levels.new_tensor(LUMA_TABLE) * factor
    chroma_step = levels.new_tensor(CHROMA_TABLE) * factor
    if official_quirks:
        luma_step = luma_step.transpose(-1, -2)
    else:
        luma_step, chroma_step = luma_step.round().clamp(1, 255), chroma_step.round().clamp(1, 255)
    luma, chroma = _quantised(luma, luma_step), _quantised(chroma, chroma_step)

    if not official_quirks:
        luma, chroma = luma.round().clamp(-128, 127), chroma.round().clamp(-128, 127)
        # libjpeg interpolates with nothing from beyond the picture, and not at all where chroma is 2 pixels wide.
        chroma = chroma[..., : (height + 1) // 2, : (width + 1) // 2]
    is_repeated = official_quirks or chroma.shape[-1] <= 2
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest" if is_repeated else "bilinear")
    ycbcr = torch.cat([luma[..., :height, :width] + 128, rounded(chroma[..., :height, :width])], dim=1)
    levels = rounded(torch.einsum("dc,bchw->bdhw", levels.new_tensor(YCBCR_TO_RGB), ycbcr))
    return (levels / 255).clamp(0, 1).to(image.dtype)


def _quantised(planes: Tensor, step: Tensor) -> Tensor:
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    dct = planes.new_tensor(_dct_matrix())
    blocks = dct.T @ (((dct @ blocks @ dct.T) / step).round() * step) @ dct
    return blocks.transpose(3, 4).reshape(planes.shape)


@cache
def _dct_matrix() -> tuple[tuple[float, ...], ...]:
    """Orthonormal DCT-II of eight samples: row k is the k-th frequency."""
    return tuple(
        tuple(math.sqrt((1 if k == 0 else 2) / 8) * math.cos((2 * n + 1) * k * math.pi / 16) for n in range(8))
        for k in range(8)
    )
