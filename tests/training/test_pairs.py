"""Pairs of crops that are degraded when they are drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import Pair
from stablesr_kit.imaging.degradations.filtering import usm_sharpen
from stablesr_kit.training.data.computed import CachedPairs
from stablesr_kit.training.data.crops import PhotoCrops
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import DegradedCrops, open_pairs
from tests.helpers.photo_files import save_photos


def crops_of(tmp_path: Path, **options: Any) -> PhotoCrops[PairOptions]:
    folder = save_photos(tmp_path / "photos", 3, 80, 96)
    return PhotoCrops(PairOptions(train_data_dir=(str(folder),), resolution=64, **options), 0)


def test_a_pair_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    crops = crops_of(tmp_path, degradations={"light": 1.0, "stablesr-768v": 1.0})
    first, again = DegradedCrops(crops), open_pairs(crops.options, 0)
    for index in (5, 0, 3):
        assert torch.equal(first[index].lq, again[index].lq) and torch.equal(first[index].hq, again[index].hq)
    assert first[0].lq.shape == first[0].hq.shape == (3, 64, 64)
    assert not torch.equal(first[0].lq, DegradedCrops(PhotoCrops(crops.options, 1))[0].lq)


def test_versions_of_a_pair_share_the_crop_and_differ_in_damage(tmp_path: Path) -> None:
    pairs = DegradedCrops(crops_of(tmp_path, degradations={"light": 1.0}), versions=2)
    first, second, next_crop = pairs[0], pairs[1], pairs[2]
    assert torch.equal(first.hq, second.hq)
    assert not torch.equal(first.lq, second.lq)
    assert not torch.equal(first.hq, next_crop.hq)


def test_degradations_are_drawn_by_their_weights(tmp_path: Path) -> None:
    """Only one of the two is clean at no_degradation_prob 0, so that what was drawn can be told."""
    pairs = DegradedCrops(crops_of(tmp_path, degradations={"area": 3.0, "codeformer-inpainting": 1.0}))
    strokes = sum((pairs[index].lq == 1).all(0).any().item() for index in range(200))
    assert strokes / 200 == pytest.approx(0.25, abs=0.08)


def test_sharpening_and_clean_pairs_can_be_chosen(tmp_path: Path) -> None:
    plain = DegradedCrops(crops_of(tmp_path, degradations={"stablesr-512": 1.0}, use_usm=False))
    sharp = DegradedCrops(PhotoCrops(crops_of(tmp_path, degradations={"area": 1.0}, use_usm=True).options, 0))
    expected = usm_sharpen((plain[0].hq[None] + 1) / 2) * 2 - 1
    torch.testing.assert_close(sharp[0].hq[None], expected, atol=1e-5, rtol=0)
    clean = DegradedCrops(crops_of(tmp_path, degradations={"area": 1.0}, no_degradation_prob=0.5))
    share = sum(torch.equal(*clean[index]) for index in range(200)) / 200
    assert share == pytest.approx(0.5, abs=0.1)


def test_a_degradation_that_gives_no_number_gives_the_good_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = DegradedCrops(crops_of(tmp_path, degradations={"area": 1.0}))
    monkeypatch.setattr("stablesr_kit.training.data.pairs.make_pair", lambda hq, *_: Pair(hq * float("nan"), hq))
    assert torch.equal(*pairs[0])


def test_degradations_without_weight_or_of_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positive weights"):
        DegradedCrops(crops_of(tmp_path, degradations={"area": 0.0}))
    with pytest.raises(ConfigError, match="did you mean 'light'"):
        DegradedCrops(crops_of(tmp_path, degradations={"ligth": 1.0}))


def test_parts_of_cached_pairs_are_the_same_of_both_pictures_and_fit(tmp_path: Path) -> None:
    hq = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_file({"hq": hq, "lq": 255 - hq}, tmp_path / "pairs.safetensors")
    pairs = CachedPairs(tmp_path / "pairs.safetensors", 8, seed=0)
    lq, good = pairs[5]
    assert good.shape == (3, 8, 8)
    torch.testing.assert_close(lq, -good)
    assert torch.equal(pairs[5].hq, good) and not torch.equal(pairs[6].hq, good)
    with pytest.raises(ConfigError, match="resolution=17 is larger than the cached pairs"):
        CachedPairs(tmp_path / "pairs.safetensors", 17, seed=0)
