"""Reflection padding that works for any size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region, Resized


@dataclass(frozen=True)
class Padded(Resized):
    """A picture continued on all sides to height x width by mirror reflection, where it is read.

    Edges are not doubled; a picture smaller than its padding is reflected again and again, a single pixel is repeated.

    Attributes:
        margin: rows above the picture, and columns to the left of it; the rest is below and to the right.
    """

    margin: int = 0

    def read(self, region: Region) -> Tensor:
        _, height, width = self.image.shape
        top, left, bottom, right = (edge - self.margin for edge in region)
        if min(top, left) >= 0 and bottom <= height and right <= width:
            return self.image.read(Region(top, left, bottom, right))
        rows = _reflected(height, top, bottom)
        columns = _reflected(width, left, right)
        first_row, last_row = rows.aminmax()
        first_column, last_column = columns.aminmax()
        read = Region(int(first_row), int(first_column), int(last_row) + 1, int(last_column) + 1)
        return self.image.read(read)[:, :, rows - first_row][:, :, :, columns - first_column]


def _reflected(length: int, first: int, end: int) -> Tensor:
    """Source index of the padded positions `first` to `end`: 0 1 2 3 2 1 0 1 ... for length 4."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(first, end) % period
    return torch.where(position < length, position, period - position)
