"""The resizing modes that degradations draw from."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)


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
