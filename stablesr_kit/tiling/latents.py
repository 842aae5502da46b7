"""Aggregation sampling: one prediction for a canvas of any size, from tiles the UNet can take (Wang et al. 2023)."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from einops import repeat
from torch import Tensor

from stablesr_kit.errors import is_out_of_memory
from stablesr_kit.imaging.canvas import Region
from stablesr_kit.tiling.team import OthersFailed, Team, TileRequest

logger = logging.getLogger(__name__)

TileSize = Literal["auto", "none"] | int

GAUSSIAN_VARIANCE = 0.01  # of a side of length 1 (Wang et al. 2023, sec. 3.4)


class Predict(Protocol):
    """Prediction for a batch of tiles at one timestep: `steered_prediction` with its other arguments bound.

    With a team it is a `functools.partial`, so that the others get these arguments too.
    """

    def __call__(self, *, latents: Tensor, lq_latents: Tensor, prompt_embeds: Tensor, **kwargs: Any) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """How a canvas of latents is covered by tiles.

    Args:
        tile: height and width of a tile.
        overlap: least overlap of neighbours.
        batch_size: tiles per call of the networks. On the CPU it is always one: batches are hardly faster there and
            round differently.
    """

    tile: tuple[int, int]
    overlap: int = 0
    batch_size: int = 1

    def halved(self, multiple: int) -> "TileGrid | None":
        """The grid with half the batch or, if that is 1, half the tile; None if tiles get too small for the networks.

        multiple: tile sides are multiples of this, and at least two of them.
        """
        if self.batch_size > 1:
            return replace(self, batch_size=self.batch_size // 2)
        if max(self.tile) <= 2 * multiple:
            return None
        half = max(max(self.tile) // 2 // multiple, 2) * multiple
        tile = (min(self.tile[0], half), min(self.tile[1], half))
        return replace(self, tile=tile, overlap=min(self.overlap or half // 4, half // 2))


class Aggregation:
    """Predicts on a canvas of any size and on any device, tile by tile on the networks' device.

    Where tiles overlap, predictions are averaged with gaussian weights, summed in the order of the tiles. On the CPU
    neither the batch size nor the order of computation changes the result.

    Args:
        size: height and width of the canvas.
        grid: the first grid, None for the whole canvas; when memory runs out it is halved for the rest of the run.
        multiple: tile sides are multiples of this.
        device, dtype: of the networks.
        jitter_seed: moves the tiles at every step, so that no border stays in place; None does not.
        weights: (height, width) of a tile -> weights of its positions where tiles overlap; None is `gaussian_weights`.
        team: processes that predict tiles as well; None predicts all of them here.
    """

    def __init__(
        self,
        size: tuple[int, int],
        grid: TileGrid | None,
        multiple: int,
        device: torch.device,
        dtype: torch.dtype,
        jitter_seed: int | None = None,
        weights: Callable[[int, int], Tensor] | None = None,
        team: Team | None = None,
    ) -> None:
        self.size = size
        self.grid = grid or TileGrid(tile=size)
        self.multiple = multiple
        self.device = device
        self.dtype = dtype
        self.jitter_seed = jitter_seed
        self.weights = weights or gaussian_weights
        self.team = team

    def regions(self, step: int) -> list[Region]:
        """The tiles of a step, row by row."""
        tile, overlap = self.grid.tile, self.grid.overlap
        shift = (0, 0)
        if self.jitter_seed is not None:
            drawn = np.random.SeedSequence((self.jitter_seed, step)).generate_state(2)
            shift = (int(drawn[0]) % (tile[0] - overlap), int(drawn[1]) % (tile[1] - overlap))
        return cover(*self.size, tile, overlap, shift)

    def count(self, steps: range) -> int:
        """Tiles that these steps predict."""
        return sum(len(self.regions(step)) for step in steps)

    def show_on(self, progress_bar: Any, steps: range) -> None:
        """Make a tqdm bar count the tiles of the coming steps, or the steps if there are no tiles."""
        tiles = self.count(steps)
        progress_bar.total = progress_bar.n + tiles
        progress_bar.unit = "tile" if tiles > len(steps) else "step"
        progress_bar.refresh()

    def predict(
        self,
        predict: Predict,
        latents: Tensor,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        step: int,
        image_embeds: Sequence[Tensor] = (),
        on_tile: Callable[[], object] = lambda: None,
        on_halving: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Prediction (B, C, h, w) for a canvas, on its device and in its dtype.

        latents, lq_latents: (B, C, h, w). prompt_embeds: as in `steered_prediction`. image_embeds: one tensor
        per IP adapter, with the same batch. on_tile: called after each tile. on_halving: called after the grid was
        halved, before the step begins again.

        Raises:
            torch.OutOfMemoryError: even one of the smallest tiles is too large (on the CPU, its own error).
        """
        while True:
            regions = self.regions(step)
            try:
                blend = Blend(regions, self.weights)
                inputs = latents, lq_latents, prompt_embeds, list(image_embeds)
                for index, prediction in self._predictions_of_all(predict, *inputs, regions):
                    on_tile()
                    if len(regions) == 1:
                        return prediction.to(latents)
                    blend.add(index, prediction)
                return blend.mean().to(latents)
            except (RuntimeError, MemoryError) as error:
                halved = self.grid.halved(self.multiple) if is_out_of_memory(error) else None
                if halved is None:
                    raise
                logger.warning("not enough memory for %s; going on with %s", self.grid, halved)
                self.grid = halved
                on_halving()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def predictions(
        self,
        predict: Predict,
        latents: Tensor,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        image_embeds: list[Tensor],
        regions: Sequence[Region],
        indices: Sequence[int],
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, prediction (B, C, tile height, tile width)) of the regions with these indices, in their order."""
        pictures = len(latents)
        per_call = 1 if self.device.type == "cpu" else self.grid.batch_size
        waiting: Iterable[tuple[int, Tensor]] = ()
        for first in range(0, len(indices), per_call):
            chosen = indices[first : first + per_call]
            shown = [repeat_for_tiles(embeds, pictures, len(chosen)) for embeds in image_embeds]
            predicted = predict(
                latents=self._gather(latents, [regions[i] for i in chosen]),
                lq_latents=self._gather(lq_latents, [regions[i] for i in chosen]),
                prompt_embeds=repeat_for_tiles(prompt_embeds, pictures, len(chosen)),
                **({"added_cond_kwargs": {"image_embeds": shown}} if shown else {}),
            )
            if self.device.type != "cuda" or len(indices) == 1:
                yield from zip(chosen, predicted.split(pictures), strict=True)
                continue
            # The device goes on with these tiles while those before them are fetched and blended.
            fetched = predicted.to("cpu", non_blocking=True)
            arrived = torch.Event(self.device)
            arrived.record()
            yield from waiting
            waiting = _arriving(arrived, chosen, fetched.split(pictures))
        yield from waiting

    def _predictions_of_all(
        self,
        predict: Predict,
        latents: Tensor,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        image_embeds: list[Tensor],
        regions: Sequence[Region],
    ) -> Iterable[tuple[int, Tensor]]:
        inputs = latents, lq_latents, prompt_embeds, image_embeds
        if self.team is None:
            return self.predictions(predict, *inputs, regions, range(len(regions)))
        assert isinstance(predict, partial)
        request = TileRequest(
            latents=latents.cpu(),
            lq_latents=lq_latents.cpu(),
            prompt_embeds=prompt_embeds.cpu(),
            image_embeds=[embeds.cpu() for embeds in image_embeds],
            arguments={k: v.cpu() if isinstance(v, Tensor) else v for k, v in predict.keywords.items()},
            regions=regions,
            batch_size=self.grid.batch_size,
        )
        self.team.tell(request)
        own = self.predictions(predict, *inputs, regions, self.team.share(len(regions)))
        return enumerate(self.team.exchange(prediction_shapes(request), own))

    def _gather(self, canvas: Tensor, regions: list[Region]) -> Tensor:
        tiles = torch.cat([region.crop(canvas) for region in regions])
        return tiles.to(self.device, self.dtype, non_blocking=self.device.type == "cuda")


def _arriving(arrived: torch.Event, indices: Sequence[int], tiles: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Tiles copied to the CPU, as soon as they arrive."""
    arrived.synchronize()
    yield from zip(indices, tiles, strict=True)


def assist(team: Team, predict: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Predict tiles for the first process of a team until it ends the call.

    predict: `steered_prediction` with the networks bound.

    Raises:
        Exception: this process's own error, raised after the first process has stopped.
    """
    failure: Exception | None = None
    while (request := team.listen()) is not None:
        grid = TileGrid(tile=(request.regions[0].height, request.regions[0].width), batch_size=request.batch_size)
        aggregation = Aggregation(
            (request.latents.shape[-2], request.latents.shape[-1]), grid, multiple=1, device=device, dtype=dtype
        )
        own = aggregation.predictions(
            partial(predict, **request.arguments),
            request.latents,
            request.lq_latents,
            request.prompt_embeds.to(device),
            [embeds.to(device) for embeds in request.image_embeds],
            request.regions,
            team.share(len(request.regions)),
        )
        try:
            team.exchange(prediction_shapes(request), own)
        except OthersFailed:
            pass
        except Exception as error:  # the first process knows too, and asks for less or gives up
            failure = failure if is_out_of_memory(error) else error
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if failure is not None:
        raise failure


def prediction_shapes(request: TileRequest) -> list[tuple[int, int, int, int]]:
    """Shape (B, C, tile height, tile width) of each region's prediction."""
    return [(*request.latents.shape[:2], region.height, region.width) for region in request.regions]


def repeat_for_tiles(embeds: Tensor, pictures: int, tiles: int) -> Tensor:
    """Embeddings of `pictures`, once or per guidance branch, repeated for a batch of tiles of all pictures."""
    if len(embeds) < pictures:  # one for all
        return embeds
    return repeat(embeds, "(branches pictures) ... -> (branches tiles pictures) ...", pictures=pictures, tiles=tiles)


def tile_offsets(length: int, tile: int, overlap: int, shift: int = 0) -> list[int]:
    """Where tiles begin so that they cover `length`, neighbours overlapping by `overlap` or more.

    They are evenly spaced, the last one ends with the canvas (Wang et al. 2023, sec. 3.4). `shift`, 0 to tile - overlap
    - 1, moves all but the outermost towards the beginning.

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

    official_quirks: as in the released code, whose vertical centre is half a position off, at height / 2.
    """
    rows = _gaussian(height, height / 2 if official_quirks else (height - 1) / 2)
    return rows[:, None] * _gaussian(width, (width - 1) / 2)


def _gaussian(length: int, centre: float) -> Tensor:
    distance = (torch.arange(length, dtype=torch.float64) - centre) / length
    return (-(distance**2) / (2 * GAUSSIAN_VARIANCE)).exp() / math.sqrt(2 * math.pi * GAUSSIAN_VARIANCE)


class Blend:
    """Weighted mean of overlapping tiles, (..., H, W); its bits do not depend on the order in which tiles arrive.

    Sums are float64 and taken in the order of `tiles`: a tile that arrives early waits for those before it.

    Args:
        tiles: regions that cover the canvas.
        weights: (height, width) of a tile -> its weights.
    """

    def __init__(self, tiles: Sequence[Region], weights: Callable[[int, int], Tensor] = gaussian_weights) -> None:
        self.tiles = tiles
        self._weights = {size: weights(*size) for size in {(tile.height, tile.width) for tile in tiles}}
        self._waiting: dict[int, Tensor] = {}
        self._added = 0
        self._sum: Tensor | None = None

    def add(self, index: int, values: Tensor) -> None:
        """Add the result for `tiles[index]`, (..., tile height, tile width), from any device."""
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
    """The canvas (..., H, W): weighted mean of patches (..., tile height, tile width), one per tile in their order."""
    blend = Blend(tiles, weights)
    for index, patch in enumerate(patches):
        blend.add(index, patch)
    return blend.mean()


def native_tile(unet: UNet2DConditionModel) -> int:
    """Side of the latents the UNet was trained on, from its config, rounded to a side it can halve."""
    size = unet.config.sample_size or 64
    multiple = tile_multiple(unet)
    return max((size if isinstance(size, int) else min(size)) // multiple, 2) * multiple


def tile_multiple(unet: UNet2DConditionModel) -> int:
    """Tile sides are multiples of this, since every level of the UNet halves them."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def canvas_size(
    unet: UNet2DConditionModel,
    height: int,
    width: int,
    pixels_per_latent: int,
    min_size_px: int = 0,
    margin_px: int = 0,
) -> tuple[int, int]:
    """Height and width in pixels of the canvas for a result of height x width with a margin on all sides.

    Every level of the networks halves them.

    The deepest level keeps at least two positions per side: a group norm cannot normalise one.
    """
    multiple = pixels_per_latent * tile_multiple(unet)
    smallest = max(min_size_px, 2 * multiple)
    sides = (max(side + 2 * margin_px, smallest) for side in (height, width))
    canvas_height, canvas_width = (math.ceil(side / multiple) * multiple for side in sides)
    return canvas_height, canvas_width


def choose_grid(
    unet: UNet2DConditionModel,
    height: int,
    width: int,
    pixels_per_latent: int,
    tile_px: TileSize = "auto",
    overlap_px: int | None = None,
    batch_size: int = 1,
    margin: int = 0,
) -> TileGrid | None:
    """The grid for a canvas of latents; None samples it whole.

    Args:
        height, width: of the canvas, in latents.
        tile_px: side of a tile in pixels of the result. "auto" is the size the UNet was trained on, but up to four
            times that area the canvas stays whole; "none" never tiles.
        overlap_px: overlap of neighbours, in pixels; None is a quarter of a tile.
        margin: latents that are cut off on each side; "auto" does not count them.

    Raises:
        ValueError: the tile or the overlap cannot work; the message names one that can.
    """
    native, multiple = native_tile(unet), tile_multiple(unet)
    if tile_px == "auto":
        tile = native
    elif tile_px == "none":
        return None
    else:
        tile = checked_tile(tile_px, multiple, pixels_per_latent)
    overlap = tile // 4 if overlap_px is None else checked_overlap(overlap_px, tile, pixels_per_latent)
    inner = (height - 2 * margin) * (width - 2 * margin)
    fits = inner <= 4 * native**2 if tile_px == "auto" else max(height, width) <= tile
    if fits:
        return None
    return TileGrid(tile=(tile, tile), overlap=overlap, batch_size=batch_size)


def grids(
    unet: UNet2DConditionModel,
    height: int,
    width: int,
    pixels_per_latent: int,
    tile_px: TileSize = "auto",
    overlap_px: int | None = None,
    batch_size: int = 1,
    margin: int = 0,
) -> Iterator[TileGrid | None]:
    """The grid of `choose_grid`, followed by grids that take less and less memory.

    First the batch is halved; then, only with tile_px="auto", the tile, which changes the picture.
    """
    grid = choose_grid(unet, height, width, pixels_per_latent, tile_px, overlap_px, batch_size, margin)
    yield grid
    if grid is None and tile_px == "auto":
        native = native_tile(unet)
        overlap = native // 4 if overlap_px is None else checked_overlap(overlap_px, native, pixels_per_latent)
        grid = TileGrid(tile=(min(native, height), min(native, width)), overlap=overlap, batch_size=batch_size)
        if grid.tile != (height, width):
            yield grid
    while grid is not None:
        smaller = grid.halved(tile_multiple(unet))
        if smaller is None or (tile_px != "auto" and smaller.tile != grid.tile):
            return
        yield smaller
        grid = smaller


def checked_tile(tile_px: object, multiple: int, pixels_per_latent: int) -> int:
    """A tile side in latents.

    Raises:
        ValueError: not a number, or a side that the networks cannot halve.
    """
    unit = multiple * pixels_per_latent
    smallest = 2 * unit  # group norms have nothing to measure on one position
    if not isinstance(tile_px, int | np.integer) or isinstance(tile_px, bool):
        raise ValueError(f"tile_px={tile_px!r} is given, expected 'auto', 'none' or a number of pixels")
    if tile_px < smallest or tile_px % unit:
        below = max(tile_px // unit * unit, smallest)
        near = f"{below}" if tile_px <= smallest else f"{below} or {math.ceil(tile_px / unit) * unit}"
        raise ValueError(
            f"tile_px={tile_px} is given, expected a multiple of {unit}, {smallest} or more, which these networks can "
            f"halve; give {near}"
        )
    return int(tile_px) // pixels_per_latent


def checked_overlap(overlap_px: object, tile: int, pixels_per_latent: int) -> int:
    """An overlap in latents.

    Raises:
        ValueError: not a whole number of latents, or not smaller than the tile.
    """
    largest = (tile - 1) * pixels_per_latent
    if not isinstance(overlap_px, int | np.integer) or not 0 <= overlap_px <= largest or overlap_px % pixels_per_latent:
        raise ValueError(
            f"overlap_px={overlap_px!r} is given for tiles of {tile * pixels_per_latent} pixels, expected a multiple "
            f"of {pixels_per_latent} from 0 to {largest}"
        )
    return int(overlap_px) // pixels_per_latent
