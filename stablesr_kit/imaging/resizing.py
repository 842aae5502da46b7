"""Image batches and pictures at another size: resampled, or continued by reflection."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.imaging.canvas import BAND_ROWS, Readable, Region, Resized, View, assembled

SHARPNESS = -0.75  # of the cubic, as torch has it (Keys 1981, eq. 8, where it is a)
LOBES = 3  # of the Lanczos kernel, on each side


def resize_bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """The image (B, 3, h, w) in [-1, 1] at the size (B, 3, height, width), clamped; antialiased where it shrinks."""
    if (height, width) == tuple(image.shape[-2:]):
        return image
    shrinks = height < image.shape[-2] or width < image.shape[-1]
    return F.interpolate(image, (height, width), mode="bicubic", antialias=shrinks).clamp(-1, 1)


def resized(image: Readable, height: int, width: int) -> Readable:
    """What `resize_bicubic` gives, within rounding; where it enlarges, only what is read is computed."""
    _, given_height, given_width = image.shape
    if (height, width) == (given_height, given_width):
        return image
    if height < given_height or width < given_width:
        return View(resize_bicubic(assembled(image), height, width))
    return Enlarged(image, height, width)


def reduced(image: Readable, height: int, width: int) -> Readable:
    """A finished picture, about [-1, 1], in a smaller size; only what is read is computed."""
    return image if image.shape[1:] == (height, width) else Reduced(image, height, width)


class Enlarged(Resized):
    """A picture in [-1, 1] enlarged bicubically to height x width, clamped, where it is read."""

    def read(self, region: Region) -> Tensor:
        return _filtered(self, region, _cubic_taps).clamp(-1, 1)


class Reduced(Resized):
    """A picture reduced to height x width by Lanczos' kernel of three lobes, antialiased, as Pillow and libvips do.

    Where it is read, in bands, since a region of it takes a much larger one of the picture.
    """

    def read(self, region: Region) -> Tensor:
        rows = max(BAND_ROWS * self.height // self.image.shape[1], 1)
        tops = range(region.top, region.bottom, rows)
        strips = (Region(top, region.left, min(top + rows, region.bottom), region.right) for top in tops)
        return torch.cat([_filtered(self, strip, _lanczos_taps) for strip in strips], dim=2)


Taps = Callable[[int, int, int, int], tuple[Tensor, Tensor]]


def _filtered(resized: Resized, region: Region, taps: Taps) -> Tensor:
    """A region of a resized picture.

    Weights depend on absolute positions alone, so that every region has the bits it has in the whole.
    """
    _, height, width = resized.image.shape
    rows, row_weights = taps(height, resized.height, region.top, region.bottom)
    columns, column_weights = taps(width, resized.width, region.left, region.right)
    top, left = int(rows.min()), int(columns.min())
    values = resized.image.read(Region(top, left, int(rows.max()) + 1, int(columns.max()) + 1))
    wide = _weighted(values, columns - left, column_weights, dim=3)
    return _weighted(wide, rows - top, row_weights[..., None], dim=2)


def _lanczos_taps(given: int, wanted: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """As `_cubic_taps`, as many as the kernel covers; those beyond the picture count nothing."""
    step = given / wanted
    stretch = max(step, 1.0)
    reach = math.ceil(LOBES * stretch)
    centre = (torch.arange(first, end, dtype=torch.float64) + 0.5) * step
    indices = centre.floor().long() + torch.arange(-reach, reach + 1)[:, None]
    distance = (indices + 0.5 - centre) / stretch
    weights = torch.where(distance.abs() < LOBES, torch.sinc(distance) * torch.sinc(distance / LOBES), 0)
    weights = torch.where((indices >= 0) & (indices < given), weights, 0)
    return indices.clamp(0, given - 1), (weights / weights.sum(0)).float()


def _cubic_taps(given: int, wanted: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Source indices and weights, (taps, end - first) each, of the positions `first` to `end` of `wanted`."""
    centre = (torch.arange(first, end, dtype=torch.float64) + 0.5) * (given / wanted) - 0.5
    nearest = centre.floor()
    offsets = torch.arange(-1, 3)[:, None]
    distance = (centre - nearest - offsets).abs()
    a = SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weights = torch.where(distance <= 1, near, far)
    return (nearest.long() + offsets).clamp(0, given - 1), weights.float()


def _weighted(values: Tensor, indices: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Sum over the taps; one operation per tap, which rounds alike wherever a value lies in memory."""
    indices, weights = indices.to(values.device), weights.to(values.device)
    total = values.index_select(dim, indices[0]) * weights[0]
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        total = total + values.index_select(dim, index) * weight
    return total


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
