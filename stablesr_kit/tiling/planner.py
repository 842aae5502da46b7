"""What a call does with a canvas: whole or in tiles, how large, how many at once."""

import math
from collections.abc import Iterator
from typing import Literal

from diffusers import UNet2DConditionModel

from stablesr_kit.tiling.latents import LatentTiling

TileSize = Literal["auto", "none"] | int

LARGEST_BATCH = 8
VAE_TILES_PX = (512, 256, 128, 64)
CPU_VAE_TILE_PX = 256  # fastest there: 7.5 s per megapixel of mini, 8.4 with 128, 8.7 with 512, 10.1 with 1024


def native_tile(unet: UNet2DConditionModel) -> int:
    """Side of the latents the UNet was trained on, as its config says, as a multiple of what it can halve."""
    size = unet.config.sample_size or 64
    multiple = tile_multiple(unet)
    return max((size if isinstance(size, int) else min(size)) // multiple, 2) * multiple


def tile_multiple(unet: UNet2DConditionModel) -> int:
    """Sides of a tile are multiples of this: every level of the UNet halves them."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def choose_tiling(
    unet: UNet2DConditionModel,
    height: int,
    width: int,
    pixels_per_latent: int,
    tile_px: TileSize = "auto",
    overlap_px: int | None = None,
    batch_size: int = 1,
) -> LatentTiling | None:
    """How to sample a canvas of latents; None as a whole.

    height, width: of the canvas, in latents.
    tile_px: side of a tile in pixels of the result; "auto" takes what the UNet was trained on, and the whole canvas up
        to four times that area; "none" always the whole canvas.
    overlap_px: what neighbours share, in pixels; None is a quarter of a tile.

    Raises:
        ValueError: the tile or the overlap cannot work; the message says what can.
    """
    native, multiple = native_tile(unet), tile_multiple(unet)
    if tile_px == "auto":
        tile = native
    elif tile_px == "none":
        return None
    else:
        tile = checked_tile(tile_px, multiple, pixels_per_latent)
    overlap = tile // 4 if overlap_px is None else checked_overlap(overlap_px, tile, pixels_per_latent)
    fits = height * width <= 4 * native**2 if tile_px == "auto" else max(height, width) <= tile
    if fits:
        return None
    return LatentTiling(tile=(tile, tile), overlap=overlap, batch_size=batch_size)


def tilings(
    unet: UNet2DConditionModel,
    height: int,
    width: int,
    pixels_per_latent: int,
    tile_px: TileSize = "auto",
    overlap_px: int | None = None,
    batch_size: int = 1,
) -> Iterator[LatentTiling | None]:
    """The tiling that `choose_tiling` chooses, and then those that take less and less memory.

    First the batch is halved and then, with tile_px="auto" only, the tile: that changes the picture.
    """
    tiling = choose_tiling(unet, height, width, pixels_per_latent, tile_px, overlap_px, batch_size)
    yield tiling
    if tiling is None and tile_px == "auto":
        native = native_tile(unet)
        overlap = native // 4 if overlap_px is None else checked_overlap(overlap_px, native, pixels_per_latent)
        tiling = LatentTiling(tile=(min(native, height), min(native, width)), overlap=overlap, batch_size=batch_size)
        if tiling.tile != (height, width):
            yield tiling
    while tiling is not None:
        smaller = tiling.halved(tile_multiple(unet))
        if smaller is None or (tile_px != "auto" and smaller.tile != tiling.tile):
            return
        yield smaller
        tiling = smaller


def checked_tile(tile_px: object, multiple: int, pixels_per_latent: int) -> int:
    """A tile side in latents.

    Raises:
        ValueError: not a number, or not one the networks can halve.
    """
    unit = multiple * pixels_per_latent
    smallest = 2 * unit  # group norms have nothing to measure on one position
    if not isinstance(tile_px, int) or isinstance(tile_px, bool):
        raise ValueError(f"tile_px={tile_px!r} is given, expected 'auto', 'none' or a number of pixels")
    if tile_px < smallest or tile_px % unit:
        below = max(tile_px // unit * unit, smallest)
        near = f"{below}" if tile_px <= smallest else f"{below} or {math.ceil(tile_px / unit) * unit}"
        raise ValueError(
            f"tile_px={tile_px} is given, expected a multiple of {unit}, {smallest} or more, which these networks can "
            f"halve; give {near}"
        )
    return tile_px // pixels_per_latent


def checked_overlap(overlap_px: object, tile: int, pixels_per_latent: int) -> int:
    """An overlap in latents.

    Raises:
        ValueError: not a number of whole latents, or as large as the tile.
    """
    largest = (tile - 1) * pixels_per_latent
    if not isinstance(overlap_px, int) or not 0 <= overlap_px <= largest or overlap_px % pixels_per_latent:
        raise ValueError(
            f"overlap_px={overlap_px!r} is given for tiles of {tile * pixels_per_latent} pixels, expected a multiple "
            f"of {pixels_per_latent} from 0 to {largest}"
        )
    return overlap_px // pixels_per_latent
