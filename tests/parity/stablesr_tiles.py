"""Weights of tiles, and splitting and merging of pixels, against the reference tensors of `tiles.safetensors`."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.imaging.canvas import Region
from stablesr_kit.tiling.latents import gaussian_weights, merge
from tests.parity.references import Quantity, difference, metadata, uniform_weights

WEIGHTS = 1e-12
PIXELS = 1e-5
official_weights = partial(gaussian_weights, official_quirks=True)


def check_tiles(folder: Path) -> Iterator[Quantity]:
    """Every quantity of tiles.safetensors; infinity for a name not understood."""
    reference = load_file(folder / "tiles.safetensors")
    ours = {key: numbered for key in reference if (numbered := from_its_name(key)) is not None}
    if "spliter_in" in reference:
        about = metadata(folder / "tiles.safetensors")["spliter"]
        ours |= split_and_merged(reference["spliter_in"], about["pch"], about["stride"])
    for key in sorted(reference.keys() - {"spliter_in"}):
        tolerance = PIXELS if key.startswith("spliter_out") else WEIGHTS if key.startswith("w") else 0.0
        yield f"tiles.{key}", difference(ours[key], reference[key]) if key in ours else float("inf"), tolerance


def from_its_name(key: str) -> Tensor | None:
    """Weights w<width>_h<height>, starts_len<length>_p<size>_s<stride>; None for another name."""
    if match := re.fullmatch(r"w(\d+)_h(\d+)", key):
        width, height = map(int, match.groups())
        return official_weights(height, width)
    if match := re.fullmatch(r"starts_len(\d+)_p(\d+)_s(\d+)", key):
        return torch.tensor(split_starts(*map(int, match.groups())))
    return None


def split_and_merged(image: Tensor, size: int, stride: int) -> dict[str, Tensor]:
    """Boxes of the pixel tiles, and both merges of patches that were changed, each in another way."""
    tiles = split_pixels(*image.shape[-2:], size, stride)
    patches = [tile.crop(image) * (1 + 0.1 * k) + 0.01 * k for k, tile in enumerate(tiles)]
    return {
        "spliter_boxes_h0h1w0w1": torch.tensor([[t.top, t.bottom, t.left, t.right] for t in tiles]),
        "spliter_out_gaussian": merge(tiles, patches, official_weights),
        "spliter_out_uniform": merge(tiles, patches, uniform_weights),
    }


def split_starts(length: int, size: int, stride: int) -> list[int]:
    """Where the pixel tiles of the released scripts begin: every `stride`, none reaching beyond the end."""
    return list(dict.fromkeys(max(min(start, length - size), 0) for start in range(0, length, stride)))


def split_pixels(height: int, width: int, size: int, stride: int) -> list[Region]:
    """The pixel tiles of the released scripts in their order, from top to bottom and then to the right."""
    return [
        Region(top, left, min(top + size, height), min(left + size, width))
        for left in split_starts(width, size, stride)
        for top in split_starts(height, size, stride)
    ]
