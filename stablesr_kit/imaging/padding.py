"""Reflection padding that works for any size."""

import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region, Resized


class Padded(Resized):
    """A picture continued to the right and below to height x width by mirror reflection, where it is read.

    Edges are not doubled; a picture smaller than its padding is reflected again and again, a single pixel is repeated.
    """

    def read(self, region: Region) -> Tensor:
        _, height, width = self.image.shape
        if region.bottom <= height and region.right <= width:
            return self.image.read(region)
        rows = _reflected(height, region.top, region.bottom)
        columns = _reflected(width, region.left, region.right)
        top, bottom = rows.aminmax()
        left, right = columns.aminmax()
        values = self.image.read(Region(int(top), int(left), int(bottom) + 1, int(right) + 1))
        return values[:, :, rows - top][:, :, :, columns - left]


def _reflected(length: int, first: int, end: int) -> Tensor:
    """Source index of the padded positions `first` to `end`: 0 1 2 3 2 1 0 1 ... for length 4."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(first, end) % period
    return torch.where(position < length, position, period - position)
