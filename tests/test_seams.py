"""The borders of the tiles do not show, by a statistic that finds them where they do."""

import pytest
import torch

from benchmarks.seams import added_by_restoring, border_lines, gradient, seam_energy
from stablesr_kit.imaging.tiles import cover, gaussian_weights, merge
from tests.parity_references import uniform_weights
from tests.tiny import seeded, tiny_pipeline, unit_noise


def test_the_border_lines_are_the_ends_of_tiles_and_the_middle_between_two() -> None:
    assert border_lines([(0, 8), (6, 14)]) == {0, 8, 6, 7, 14}


@pytest.mark.parametrize("seed", range(3))
def test_tiles_that_differ_are_found_without_a_blend_and_not_with_it(seed: int) -> None:
    """Tiles off by up to a twentieth, as by their own group norms, under texture as any restored picture has it."""
    textured = 0.02 * unit_noise(1, 3, 160, 240, seed=seed)
    tiles = cover(160, 240, (64, 64), 32)
    shifts = 0.1 * (torch.rand(len(tiles), generator=seeded(seed)) - 0.5)
    patches = [tile.crop(textured) + shift for tile, shift in zip(tiles, shifts, strict=True)]
    in_latents = cover(40, 60, (16, 16), 8)
    hard = seam_energy(merge(tiles, patches, uniform_weights), in_latents, 4)
    soft = seam_energy(merge(tiles, patches, gaussian_weights), in_latents, 4)
    assert hard["p"] < 0.01 < soft["p"]


@pytest.mark.parametrize("jitter", [False, True])
def test_a_picture_restored_in_tiles_shows_no_borders(jitter: bool) -> None:
    pipeline = tiny_pipeline(with_text=False)
    added, tiles = added_by_restoring(pipeline, gradient(24, 32), 64, 32, jitter, None)
    assert len(tiles) > 4
    assert seam_energy(added, tiles, pipeline.vae_scale_factor)["p"] > 0.01


def test_a_picture_of_one_tile_has_no_border_to_measure() -> None:
    with pytest.raises(ValueError, match="is one tile"):
        seam_energy(gradient(32, 32), cover(8, 8, (8, 8), 0), 4)
