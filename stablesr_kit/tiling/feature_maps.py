"""Feature maps of a whole picture, computed region by region: only tiles are on the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stablesr_kit.imaging.canvas import Canvas, Readable, Region, regions
from stablesr_kit.models.execution import large_group_norm
from stablesr_kit.tiling.scratch import Moments, Scratch

TileFunction = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class FeatureMap:
    """Features (C, H, W) that are computed when they are read, until a workspace stores them.

    Attributes:
        read: values (1, C, h, w) of a region, on the device.
        overwrites: a map whose canvas may be reused for this one, because only this map reads it, region by region
            just before overwriting it.
        is_cheap: computing it again costs less than storing it.
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
    """Where maps are stored, and how large tiles are.

    Attributes:
        device: where tiles are computed.
        tile_values: number of values in a tile; maps with more channels have smaller tiles.
        canvas_dtype: dtype of the canvases.
        scratch: holds the canvases and the progress.
        statistics: mean and variance (C,) of each group norm's input; measured when a norm is reached, or given.
    """

    device: torch.device
    tile_values: int
    canvas_dtype: torch.dtype = torch.float32
    scratch: Scratch = field(default_factory=Scratch)
    statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def source(self, readable: Readable, dtype: torch.dtype) -> FeatureMap:
        """The map of a canvas or of anything that reads like one."""
        return FeatureMap(readable.shape, lambda region: readable.read(region).to(self.device, dtype), is_cheap=True)

    def side(self, channels: int) -> int:
        """Side of the tiles of a map with this many channels."""
        return max(math.isqrt(self.tile_values // channels), 1)

    def store(self, x: FeatureMap, *, side: int | None = None, with_moments: bool = True) -> Canvas:
        """Compute the map once and store it; the maps it was computed from are released.

        side: of the regions in which it is computed; None is the tiles' side.
        """
        if x.canvas is not None:
            return x.canvas
        old, x.overwrites = x.overwrites, None
        canvas = None if old is None or old.is_kept or not self.scratch.may_overwrite else old.canvas
        if canvas is None:
            canvas = self.scratch.canvas(x.shape, self.canvas_dtype)
        dtype = self._sweep(x, canvas, side, with_moments)
        x.canvas = canvas
        x.read = lambda region: canvas.read(region).to(self.device, dtype)
        return canvas

    def normalization(self, x: FeatureMap, norm: nn.GroupNorm, activation: TileFunction | None = None) -> TileFunction:
        """The group norm of the whole map, as a function of tiles. The map is stored, or if cheap only measured."""
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
            with _GivenStatistics(mean, variance):
                tile = norm(tile)
            return tile if activation is None else activation(tile)

        return normalized

    def _sweep(self, x: FeatureMap, canvas: Canvas | None, side: int | None, with_moments: bool) -> torch.dtype:
        """Compute the map tile by tile, filling a canvas and the moments; returns its dtype."""
        channels, height, width = x.shape
        sweep = self.scratch.begin()
        for region in islice(regions(height, width, side or self.side(channels)), sweep.done, None):
            tile = x.read(region)
            if with_moments:
                sweep.moments.add(tile)
            if canvas is not None:
                canvas.write(region, tile)
            sweep.dtype = tile.dtype
            sweep.done += 1
            self.scratch.save()
        x.moments = sweep.moments if with_moments else None
        return sweep.dtype


class _GivenStatistics(TorchFunctionMode):
    """Context in which a group norm uses these moments (C,) instead of those of its input.

    The norm is called as a module, so that offloading, which brings weights when a module is called, works.
    """

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = self._normalized if function in (F.group_norm, large_group_norm) else function
        return function(*args, **(kwargs or {}))

    def _normalized(self, tile: Tensor, _num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.batch_norm(tile, self.mean, self.variance, weight.float(), bias.float(), eps=eps)


@dataclass(kw_only=True)
class CountingWorkspace(Workspace):
    """Computes nothing; counts the tiles of a walk through the layers."""

    scratch: Scratch = field(default_factory=lambda: Scratch(device="meta"))
    tiles: int = 0

    def _sweep(self, x: FeatureMap, _canvas: Canvas | None, side: int | None, _with_moments: bool) -> torch.dtype:
        channels, height, width = x.shape
        side = side or self.side(channels)
        self.tiles += math.ceil(height / side) * math.ceil(width / side)
        x.moments = Moments.of_zeros(channels)
        return torch.float32


def layer(x: FeatureMap, function: TileFunction, channels: int, halo: int) -> FeatureMap:
    """The map after a layer that keeps the size and pads with zeros; each value depends on `halo` neighbours.

    The layer's own padding is right at the borders of the map; elsewhere the halo absorbs it.
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
    """Twice the size, by nearest neighbours and a convolution; only the result is stored."""
    _, height, width = x.shape

    def read(region: Region) -> Tensor:
        top, left, bottom, right = region
        source = Region(top // 2, left // 2, -(-bottom // 2), -(-right // 2)).grown(1, height, width)
        return region.cut_from(upsampler(x.read(source)), Region(*(2 * edge for edge in source)))

    return FeatureMap((upsampler.out_channels, 2 * height, 2 * width), read)
