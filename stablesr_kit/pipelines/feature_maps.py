"""Feature maps of a whole picture, computed region by region: the device holds tiles, canvases the rest."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from stablesr_kit.imaging.canvas import Canvas, Readable, Region, regions

TileFunction = Callable[[Tensor], Tensor]


class Moments:
    """Mean and variance per channel of a map, exact whatever tiles it comes in: each adds its sums in float64.

    Parts are merged as by Chan, Golub and LeVeque (1983, eq. 1.5); within a part the deviations are taken from one of
    its values, so that a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(1, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(1, dtype=torch.float64)

    def add(self, tile: Tensor) -> None:
        """Take in values (1, C, h, w) that no other tile holds."""
        count = tile.shape[2] * tile.shape[3]
        first, sums, squares = (value.double().cpu() for value in sums_of(tile))
        mean = sums / count
        self._merge(count, first + mean, squares - count * mean**2)

    def of_groups(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel's group, both (C,), float64."""
        mean = self.mean.view(num_groups, -1)
        group_mean = mean.mean(1, keepdim=True)
        squares = self.squares.view(num_groups, -1) + self.count * (mean - group_mean) ** 2
        variance = squares.mean(1, keepdim=True) / self.count
        return group_mean.expand_as(mean).reshape(-1), variance.expand_as(mean).reshape(-1)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference**2 * (self.count * count / total)
        self.count = total


def sums_of(tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First value of each channel of a tile (1, C, h, w), and the sums of the deviations from it and their squares."""
    rows = tile[0].permute(1, 2, 0).float()  # (h, w, C)
    first = rows[0, 0].clone()
    deviations = rows - first
    sums = deviations.sum(1).double().sum(0)
    return first, sums, deviations.square_().sum(1).double().sum(0)


@dataclass(eq=False)
class FeatureMap:
    """Features (C, H, W) that are computed where they are read, until a workspace stores them.

    Attributes:
        read: values (1, C, h, w) of a region, on the device.
        overwrites: a map whose canvas may take this one's values: it is read for nothing else, and only where it is
            being overwritten.
        is_cheap: it costs less to compute again than to keep.
        is_kept: its canvas belongs to the caller.
    """

    shape: tuple[int, int, int]
    read: Callable[[Region], Tensor]
    overwrites: "FeatureMap | None" = None
    is_cheap: bool = False
    is_kept: bool = False
    moments: Moments | None = None
    canvas: Canvas | None = None


@dataclass(kw_only=True)
class Workspace:
    """Where maps are kept and how large a tile is.

    Attributes:
        device: where tiles are computed.
        tile_values: values of a tile; a map with more channels has smaller tiles.
        canvas_dtype: dtype of the canvases.
        folder: where the canvases are; None keeps them in memory.
        statistics: mean and variance (C,) of each group norm's input; filled as norms are met, or given and trusted.
    """

    device: torch.device
    tile_values: int
    canvas_dtype: torch.dtype = torch.float32
    folder: Path | None = None
    statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def source(self, readable: Readable, dtype: torch.dtype) -> FeatureMap:
        """The map of a canvas or of anything that reads like one."""
        return FeatureMap(readable.shape, lambda region: readable.read(region).to(self.device, dtype), is_cheap=True)

    def side(self, channels: int) -> int:
        """Of a tile of a map with this many channels."""
        return max(math.isqrt(self.tile_values // channels), 1)

    def store(self, x: FeatureMap, *, side: int | None = None, with_moments: bool = True) -> Canvas:
        """Compute the map once and keep it; what it was computed from is let go.

        side: of the regions it is computed in; None is that of the tiles.
        """
        if x.canvas is not None:
            return x.canvas
        old, x.overwrites = x.overwrites, None
        canvas = None if old is None or old.is_kept else old.canvas
        if canvas is None:
            canvas = Canvas(*x.shape, dtype=self.canvas_dtype, folder=self.folder)
        dtype = self._sweep(x, canvas, side, with_moments)
        x.canvas = canvas
        x.read = lambda region: canvas.read(region).to(self.device, dtype)
        return canvas

    def normalization(self, x: FeatureMap, norm: nn.GroupNorm, activation: TileFunction | None = None) -> TileFunction:
        """The norm of the whole map as a function of its tiles; the map is stored, or only measured if it is cheap."""
        if norm not in self.statistics:
            if x.moments is None and x.is_cheap:
                self._sweep(x, None, None, True)
            else:
                self.store(x)
            assert x.moments is not None
            self.statistics[norm] = x.moments.of_groups(norm.num_groups)
        elif not x.is_cheap:
            self.store(x, with_moments=False)
        mean, variance = (value.to(self.device, torch.float32) for value in self.statistics[norm])

        def normalized(tile: Tensor) -> Tensor:
            tile = F.batch_norm(tile, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)
            return tile if activation is None else activation(tile)

        return normalized

    def _sweep(self, x: FeatureMap, canvas: Canvas | None, side: int | None, with_moments: bool) -> torch.dtype:
        """Compute the map tile by tile into a canvas and into its moments; its dtype."""
        channels, height, width = x.shape
        side = side or self.side(channels)
        moments = Moments()
        for region in regions(height, width, side):
            tile = x.read(region)
            if with_moments:
                moments.add(tile)
            if canvas is not None:
                canvas.write(region, tile)
        x.moments = moments if with_moments else None
        return tile.dtype


def layer(x: FeatureMap, function: TileFunction, channels: int, halo: int) -> FeatureMap:
    """A function of tiles that keeps their size and pads with zeros, where each value depends on `halo` neighbours.

    Its own padding is right where the map ends, and the halo takes it elsewhere.
    """
    _, height, width = x.shape

    def read(region: Region) -> Tensor:
        outer = region.grown(halo, height, width)
        return region.cut_from(function(x.read(outer)), outer)

    return FeatureMap((channels, height, width), read)


def downsampled(x: FeatureMap, downsampler: Downsample2D) -> FeatureMap:
    """Half the size by a convolution of stride 2; it pads the right and the lower end only."""
    _, height, width = x.shape

    def read(region: Region) -> Tensor:
        top, left, bottom, right = (2 * edge for edge in region)
        return downsampler(x.read(Region(top, left, min(bottom + 1, height), min(right + 1, width))))

    return FeatureMap((downsampler.out_channels, height // 2, width // 2), read)


def upsampled(x: FeatureMap, upsampler: Upsample2D) -> FeatureMap:
    """Twice the size by nearest neighbours and a convolution, of which only the result is ever whole."""
    _, height, width = x.shape

    def read(region: Region) -> Tensor:
        top, left, bottom, right = region
        source = Region(top // 2, left // 2, -(-bottom // 2), -(-right // 2)).grown(1, height, width)
        return region.cut_from(upsampler(x.read(source)), Region(*(2 * edge for edge in source)))

    return FeatureMap((upsampler.out_channels, 2 * height, 2 * width), read)
