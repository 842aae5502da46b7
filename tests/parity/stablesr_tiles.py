"""Weights of tiles, and splitting and merging of pixels, against the reference tensors of `tiles.safetensors`."""

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region
from stablesr_kit.tiling.latents import gaussian_weights, merge
from tests.parity.references import Ours, Quantity, compare, metadata, read_tensors, uniform_weights

WEIGHTS = 1e-12
PIXELS = 1e-5
official_weights = partial(gaussian_weights, official_quirks=True)


def check_tiles(folder: Path) -> Iterator[Quantity]:
    """Every quantity of tiles.safetensors; infinity for a name not understood."""
    reference = read_tensors(folder / "tiles.safetensors")
    about = metadata(folder / "tiles.safetensors")

    @cache
    def tiles() -> list[Region]:
        height, width = reference["spliter_in"].shape[-2:]
        return split_pixels(height, width, about["spliter"]["pch"], about["spliter"]["stride"])

    @cache
    def patches() -> list[Tensor]:
        """Each patch changed in another way."""
        image = reference["spliter_in"]
        return [tile.crop(image) * (1 + 0.1 * k) + 0.01 * k for k, tile in enumerate(tiles())]

    ours: Ours = {
        "spliter_boxes_h0h1w0w1": lambda: torch.tensor([[t.top, t.bottom, t.left, t.right] for t in tiles()]),
        "spliter_out_gaussian": lambda: merge(tiles(), patches(), official_weights),
        "spliter_out_uniform": lambda: merge(tiles(), patches(), uniform_weights),
    }
    for key in reference:
        if size := re.fullmatch(r"w(\d+)_h(\d+)", key):
            ours[key] = partial(official_weights, int(size[2]), int(size[1]))
        elif given := re.fullmatch(r"starts_len(\d+)_p(\d+)_s(\d+)", key):
            ours[key] = partial(lambda numbers: torch.tensor(split_starts(*numbers)), [int(n) for n in given.groups()])

    def tolerance(key: str, _expected: Tensor) -> float:
        return PIXELS if key.startswith("spliter_out") else WEIGHTS if key.startswith("w") else 0.0

    yield from compare("tiles", {key: reference[key] for key in reference if key != "spliter_in"}, ours, tolerance)


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
