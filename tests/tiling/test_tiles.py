"""Tiles: they cover every canvas, their weights are symmetric, and their mean does not know the order they came in."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stablesr_kit.imaging.canvas import Region
from stablesr_kit.tiling.latents import (
    Blend,
    cover,
    gaussian_weights,
    merge,
    tile_offsets,
)
from tests.helpers.tiny import seeded, unit_noise
from tests.parity.references import uniform_weights
from tests.parity.stablesr_tiles import split_pixels, split_starts


@pytest.mark.parametrize("seed", range(20))
def test_tiles_of_one_size_cover_every_canvas_and_overlap_as_asked(seed: int) -> None:
    draw = random.Random(seed)
    height, width = draw.randrange(1, 90), draw.randrange(1, 90)
    tile = draw.randrange(2, 40), draw.randrange(2, 40)
    overlap = draw.randrange(0, min(tile))
    shift = draw.randrange(0, 50), draw.randrange(0, 50)
    tiles = cover(height, width, tile, overlap, shift)
    seen = torch.zeros(height, width)
    for one in tiles:
        one.crop(seen).add_(1)
        assert (one.height, one.width) == (min(tile[0], height), min(tile[1], width))
    assert seen.min() >= 1
    assert len(tiles) == len(set(tiles)) and tiles == sorted(tiles)
    for starts, size in ((sorted({t.top for t in tiles}), tile[0]), (sorted({t.left for t in tiles}), tile[1])):
        assert all(after - before <= size - overlap for before, after in zip(starts, starts[1:], strict=False))


def test_offsets_are_those_of_the_paper_and_a_shift_moves_the_inner_ones_only() -> None:
    assert tile_offsets(96, 64, 32) == [0, 32]
    assert tile_offsets(100, 64, 32) == [0, 32, 36]
    assert tile_offsets(64, 64, 63) == [0]
    assert tile_offsets(200, 64, 16, shift=20) == [0, 28, 76, 124, 136]
    assert {tile_offsets(200, 64, 16, shift)[1] for shift in range(48)} == set(range(1, 49))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, 9), (8, -1), (0, -1), (17, 4)])
def test_an_overlap_that_leaves_nothing_to_advance_and_a_tile_beyond_the_canvas_are_refused(
    tile: int, overlap: int
) -> None:
    with pytest.raises(ValueError, match="expected"):
        tile_offsets(16, tile, overlap)


def test_pixel_tiles_never_reach_beyond_the_picture_even_where_one_side_is_smaller_than_the_tile() -> None:
    assert split_starts(4096, 1280, 1000) == [0, 1000, 2000, 2816]
    assert split_starts(900, 1280, 1000) == [0]
    assert split_pixels(900, 2000, 1280, 1000) == [Region(0, 0, 900, 1280), Region(0, 720, 900, 2000)]


@pytest.mark.parametrize("size", [(6, 9), (64, 64), (1, 5)])
def test_weights_are_symmetric_positive_and_largest_in_the_middle(size: tuple[int, int]) -> None:
    weights = gaussian_weights(*size)
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))
    assert weights.min() > 0
    assert weights[(size[0] - 1) // 2, (size[1] - 1) // 2] == weights.max()


@pytest.mark.parametrize("weights", [gaussian_weights, uniform_weights])
def test_tiles_cut_from_a_canvas_merge_to_it(weights: Callable[[int, int], Tensor]) -> None:
    canvas = unit_noise(2, 3, 37, 53)
    tiles = cover(37, 53, (16, 20), 7)
    torch.testing.assert_close(merge(tiles, (t.crop(canvas) for t in tiles), weights), canvas, atol=1e-6, rtol=0)


def test_the_mean_is_the_same_to_the_bit_in_any_order() -> None:
    tiles = cover(40, 40, (16, 16), 12)
    patches = [unit_noise(1, 2, 16, 16, seed=i) for i in range(len(tiles))]
    expected = merge(tiles, patches)
    for seed in range(3):
        blend = Blend(tiles)
        for index in torch.randperm(len(tiles), generator=seeded(seed)).tolist():
            blend.add(index, patches[index])
        assert torch.equal(blend.mean(), expected)


def test_a_tile_that_never_arrived_is_an_error() -> None:
    tiles = cover(8, 12, (8, 8), 4)
    blend = Blend(tiles)
    blend.add(1, torch.zeros(1, 8, 8))
    with pytest.raises(RuntimeError, match="tile 0 of 2"):
        blend.mean()
