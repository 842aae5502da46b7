"""Rectangles that cover a canvas, and the weighted mean that makes one canvas of what was computed on each."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region

GAUSSIAN_VARIANCE = 0.01  # of a side of length 1 (Wang et al. 2023, sec. 3.4)


def tile_offsets(length: int, tile: int, overlap: int, shift: int = 0) -> list[int]:
    """Where tiles begin so that they cover `length`, neighbours overlapping by `overlap` or more.

    Evenly spaced, the last one flush with the end (Wang et al. 2023, sec. 3.4). `shift`, 0 to tile - overlap - 1, moves
    all but the outermost towards the beginning.

    Raises:
        ValueError: the overlap leaves no room to advance, or the tile is longer than the canvas.
    """
    stride = tile - overlap
    if overlap < 0 or stride < 1:
        raise ValueError(f"an overlap of {overlap} is given for tiles of {tile}, expected 0 to {tile - 1}")
    if not 0 < tile <= length:
        raise ValueError(f"a tile of {tile} is given for a canvas of {length}, expected 1 to {length}")
    last = length - tile
    positions = range(-(shift % stride), last + stride, stride)
    return sorted({min(max(position, 0), last) for position in positions})


def cover(
    height: int, width: int, tile: tuple[int, int], overlap: int, shift: tuple[int, int] = (0, 0)
) -> list[Region]:
    """Tiles of one size (height, width) that cover a canvas, row by row; a tile is cut where the canvas is smaller.

    shift: rows and columns by which the inner tiles are moved, see `tile_offsets`.

    Raises:
        ValueError: the overlap is as large as the tile.
    """
    tile_height, tile_width = min(tile[0], height), min(tile[1], width)
    tops = tile_offsets(height, tile_height, overlap if tile_height < height else 0, shift[0])
    lefts = tile_offsets(width, tile_width, overlap if tile_width < width else 0, shift[1])
    return [Region(top, left, top + tile_height, left + tile_width) for top in tops for left in lefts]


def gaussian_weights(height: int, width: int, official_quirks: bool = False) -> Tensor:
    """Weight (height, width), float64, of each position of a tile: a gaussian of its distance to the centre.

    official_quirks: the released code puts the centre half a position too low, at height / 2.
    """
    rows = _gaussian(height, height / 2 if official_quirks else (height - 1) / 2)
    return rows[:, None] * _gaussian(width, (width - 1) / 2)


def _gaussian(length: int, centre: float) -> Tensor:
    distance = (torch.arange(length, dtype=torch.float64) - centre) / length
    return (-(distance**2) / (2 * GAUSSIAN_VARIANCE)).exp() / math.sqrt(2 * math.pi * GAUSSIAN_VARIANCE)


class Blend:
    """Weighted mean of overlapping tiles, (..., H, W), the same to the bit in whatever order the tiles arrive.

    Sums are float64 and taken in the order of `tiles`: a tile that arrives early waits for those before it.

    Args:
        tiles: what covers the canvas.
        weights: (height, width) of a tile -> its weights.
    """

    def __init__(self, tiles: Sequence[Region], weights: Callable[[int, int], Tensor] = gaussian_weights) -> None:
        self.tiles = tiles
        self._weights = {size: weights(*size) for size in {(tile.height, tile.width) for tile in tiles}}
        self._waiting: dict[int, Tensor] = {}
        self._added = 0
        self._sum: Tensor | None = None

    def add(self, index: int, values: Tensor) -> None:
        """What was computed on `tiles[index]`, (..., tile height, tile width), on any device."""
        self._waiting[index] = values
        while self._added in self._waiting:
            tile, waited = self.tiles[self._added], self._waiting.pop(self._added)
            if self._sum is None:
                self._sum = torch.zeros(*waited.shape[:-2], *self._size(), dtype=torch.float64)
            tile.crop(self._sum).add_(waited.detach().to("cpu", torch.float64) * self._weights[tile.height, tile.width])
            self._added += 1

    def mean(self) -> Tensor:
        """The canvas, float32, on the CPU.

        Raises:
            RuntimeError: a tile has not arrived.
        """
        if self._sum is None or self._added < len(self.tiles):
            raise RuntimeError(f"tile {self._added} of {len(self.tiles)} has not arrived; add every tile once")
        total = torch.zeros(*self._size(), dtype=torch.float64)
        for tile in self.tiles:
            tile.crop(total).add_(self._weights[tile.height, tile.width])
        mean = torch.empty(self._sum.shape)
        for one, summed in zip(mean.flatten(0, -3), self._sum.flatten(0, -3), strict=True):  # no second float64 canvas
            one.copy_(summed / total)
        return mean

    def _size(self) -> tuple[int, int]:
        return max(tile.bottom for tile in self.tiles), max(tile.right for tile in self.tiles)


def merge(
    tiles: Sequence[Region], patches: Iterable[Tensor], weights: Callable[[int, int], Tensor] = gaussian_weights
) -> Tensor:
    """The canvas (..., H, W) that patches (..., tile height, tile width), in the order of the tiles, average to."""
    blend = Blend(tiles, weights)
    for index, patch in enumerate(patches):
        blend.add(index, patch)
    return blend.mean()
