"""Reflection padding that works for any size."""

import torch
from torch import Tensor


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """The image (B, C, H, W) continued to the right and below to (B, C, height, width) by mirror reflection.

    Edges are not doubled; a picture smaller than its padding is reflected again and again, a single pixel is repeated.
    """
    rows = _reflected(image.shape[-2], height, image.device)
    columns = _reflected(image.shape[-1], width, image.device)
    return image[:, :, rows][:, :, :, columns]


def _reflected(length: int, padded: int, device: torch.device) -> Tensor:
    """Source index of each padded position: 0 1 2 3 2 1 0 1 ... for length 4."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(padded, device=device) % period
    return torch.where(position < length, position, period - position)
