"""The borders of the tiles do not show, by a statistic that finds them where they do."""

import pytest

from benchmarks.seams import added_by_restoring, border_lines, gradient, seam_energy, with_hard_tiles
from stablesr_kit.tiling.latents import cover
from tests.helpers.tiny import tiny_pipeline, unit_noise


def test_the_border_lines_are_the_ends_of_tiles_and_the_middle_between_two() -> None:
    assert border_lines([(0, 8), (6, 14)]) == {0, 8, 6, 7, 14}


@pytest.mark.parametrize("seed", range(3))
def test_tiles_that_differ_by_two_levels_are_found_and_nothing_is_found_where_they_do_not_differ(seed: int) -> None:
    textured = 0.02 * unit_noise(1, 3, 160, 240, seed=seed)  # five levels, as any restored picture has
    tiles = cover(40, 60, (16, 16), 8)
    hard = seam_energy(with_hard_tiles(textured, tiles, 2, 4), tiles, 4)
    alike = seam_energy(textured, tiles, 4)
    assert hard["p"] < 0.01 < alike["p"]
    assert hard["ratio"] > 1.2 > alike["ratio"]


@pytest.mark.parametrize("jitter", [False, True])
def test_a_picture_restored_in_tiles_shows_no_borders(jitter: bool) -> None:
    pipeline = tiny_pipeline(with_text=False)
    added, tiles = added_by_restoring(pipeline, gradient(24, 32), 64, 32, jitter, None)
    assert len(tiles) > 4
    assert seam_energy(added, tiles, pipeline.vae_scale_factor)["p"] > 0.01


def test_a_picture_of_one_tile_has_no_border_to_measure() -> None:
    with pytest.raises(ValueError, match="is one tile"):
        seam_energy(gradient(32, 32), cover(8, 8, (8, 8), 0), 4)
