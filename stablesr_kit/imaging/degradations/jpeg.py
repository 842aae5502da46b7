"""Baseline JPEG with 4:2:0 chroma, coded and decoded at once by tensor arithmetic, so that it runs on any device.

It quantises as the standard does (ITU-T T.81, annex K tables, scaled by quality as libjpeg does) and differs from a
file in three ways, all shared with the DiffJPEG that Real-ESRGAN trains with: the input is not rounded to 8 bit, the
scaled tables are not rounded to integers, and a border beyond the picture is black.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """The picture after JPEG at `quality` (1 to 100, one number or one per picture, shape (B,)).

    image: (B, 3, H, W), RGB in [0, 1]; the result is clamped to [0, 1]. official_quirks transposes the luma table, as
    DiffJPEG does: horizontal detail then loses what vertical detail loses in a file.
    """
    batch, _, height, width = image.shape
    levels = F.pad(image.float(), (0, -width % 16, 0, -height % 16)) * 255
    ycbcr = torch.einsum("dc,bchw->bdhw", levels.new_tensor(RGB_TO_YCBCR), levels)
    factor = _table_factor(torch.as_tensor(quality).to(levels).expand(batch))
    luma_table = levels.new_tensor(LUMA_TABLE)
    luma_table = luma_table.T if official_quirks else luma_table
    luma = _quantised(ycbcr[:, :1] - 128, luma_table * factor) + 128
    chroma = _quantised(F.avg_pool2d(ycbcr[:, 1:], 2), levels.new_tensor(CHROMA_TABLE) * factor)
    ycbcr = torch.cat([luma, chroma.repeat_interleave(2, -2).repeat_interleave(2, -1)], dim=1)
    levels = torch.einsum("dc,bchw->bdhw", levels.new_tensor(YCBCR_TO_RGB), ycbcr)
    return (levels[..., :height, :width] / 255).clamp(0, 1).to(image.dtype)


def _table_factor(quality: Tensor) -> Tensor:
    """What the tables are multiplied by (libjpeg): 50/q below quality 50, 2 - q/50 from there."""
    return torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1, 1, 1, 1)


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
