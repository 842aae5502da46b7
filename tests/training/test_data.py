"""Crops of photographs: functions of seed and index alone, whatever is damaged and however many workers load them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.seeds import stream
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.crops import (
    EpochOrder,
    PhotoCrops,
    Purpose,
    RandomCrops,
    cut,
    describe_faults,
    report_skipped,
)
from stablesr_kit.training.data.options import PairOptions, PhotoOptions
from tests.helpers.forks import FORKS
from tests.helpers.photo_files import numbers_in, photo, save_photos


def options_of(folder: Path, **options: Any) -> PhotoOptions:
    return PhotoOptions(**{"train_data_dir": (str(folder),), "resolution": 16} | options)


def test_every_photo_comes_once_per_epoch_in_an_order_of_its_own() -> None:
    order = EpochOrder([10], 0, Share(3, 2))
    epochs = [[order[index] for index in range(10 * epoch, 10 * epoch + 10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [EpochOrder([10], 0, Share())[i] for i in (25, 3, 11)] == [epochs[2][5], epochs[0][3], epochs[1][1]]


def test_groups_stay_together_and_each_process_has_its_own() -> None:
    share = Share(batch_size=2, processes=2)
    order = EpochOrder([6, 6, 6, 6], 0, share)
    seen: list[list[int]] = [[], []]
    for index in range(24):
        seen[index // 2 % 2].append(order[index])
    assert sorted(seen[0] + seen[1]) == list(range(24))
    for numbers in seen:
        assert len({number // 6 for number in numbers[:6]}) == len({number // 6 for number in numbers[6:]}) == 1
    assert order.group_of(7) == range(6, 12)


def test_unequal_groups_give_every_process_epochs_of_one_length() -> None:
    order = EpochOrder([9, 3, 2], 0, Share(1, 2))
    assert order.epoch_length == 7
    drawn = Counter(order[index] for index in range(14 * 60))
    assert set(drawn) == set(range(14))
    assert EpochOrder([5], 0, Share(4, 8)).epoch_length == 5  # fewer groups than processes: all share them


def test_crops_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    options = options_of(save_photos(tmp_path / "photos", 5))
    first, again, other = (RandomCrops(PhotoCrops(options, seed)) for seed in (0, 0, 1))
    expected = [first[index] for index in range(12)]
    assert all(torch.equal(again[index], expected[index]) for index in reversed(range(12)))
    assert not any(torch.equal(a, other[index]) for index, a in enumerate(expected))
    assert expected[0].shape == (3, 16, 16) and expected[0].dtype == torch.float32
    assert len(numbers_in(torch.stack(expected[:5]).numpy())) == 5


@pytest.mark.parametrize("context", ["fork", FORKS], ids=["fork", "forkserver"])
def test_workers_give_the_same_crops_and_their_findings_reach_the_run(
    context: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_photos(tmp_path / "photos", 6)
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    options = options_of(folder)
    alone, shared = PhotoCrops(options, 0), PhotoCrops(options, 0)
    loader = DataLoader(
        RandomCrops(shared), 2, sampler=range(12), num_workers=2, multiprocessing_context=context, drop_last=False
    )
    batches = torch.cat(list(loader))
    assert torch.equal(batches, torch.stack([RandomCrops(alone)[index] for index in range(12)]))
    assert 2 not in numbers_in(batches.numpy())
    report_skipped(shared, Accelerator(cpu=True))
    assert f"1 of 6 photographs were skipped: {folder / '002.png'} (damaged)" in caplog.text


def test_a_loader_resumed_after_some_batches_gives_the_remaining_ones(tmp_path: Path) -> None:
    crops = RandomCrops(PhotoCrops(options_of(save_photos(tmp_path / "photos", 5)), 0))
    whole, rest = (list(DataLoader(crops, 2, sampler=range(first, 14))) for first in (0, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_a_crop_is_a_part_of_its_photo_mirrored_half_the_time(tmp_path: Path) -> None:
    crops = PhotoCrops(options_of(save_photos(tmp_path / "photos", 2)), 0)
    mirrored = 0
    corners = set()
    for index in range(400):
        pixels = crops.draw(index).hq
        is_mirrored = int(pixels[0, 1, 2]) < int(pixels[0, 0, 2])
        upright = pixels[:, ::-1] if is_mirrored else pixels
        top, left = int(upright[0, 0, 1]), int(upright[0, 0, 2])
        expected = np.asarray(photo(int(pixels[0, 0, 0])))[top : top + 16, left : left + 16]
        assert np.array_equal(upright, expected)
        mirrored += is_mirrored
        corners.add((top, left))
    assert mirrored / 400 == pytest.approx(0.5, abs=0.08)
    assert {top for top, _ in corners} >= {0, 32} and {left for _, left in corners} >= {0, 48}


def test_turning_and_mirroring_are_options(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 1, 16, 16)
    whole = np.asarray(photo(0, 16, 16))
    plain = PhotoCrops(options_of(folder, random_flip=False), 0)
    assert all(np.array_equal(plain.draw(index).hq, whole) for index in range(8))
    turned = PhotoCrops(options_of(folder, random_rotation=True), 0)
    assert len({turned.draw(index).hq.tobytes() for index in range(100)}) == 8


def test_a_photo_smaller_than_the_crop_is_skipped_or_continued_by_reflection(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 2)
    photo(9, 12, 40).save(folder / "low.png")
    skipping = PhotoCrops(options_of(folder), 0)
    assert 9 not in numbers_in(np.stack([skipping.draw(index).hq for index in range(12)]))
    assert "low.png (smaller than a crop)" in describe_faults(skipping.source, skipping.faults)
    padding = PhotoCrops(options_of(folder, small_photos="pad", random_flip=False), 0)
    crop = next(crop for crop in map(padding.draw, range(12)) if crop.hq[0, 0, 0] == 9).hq
    assert crop[:, 0, 1].tolist() == [*range(12), 10, 9, 8, 7]
    assert not padding.faults.any()


def test_photos_below_the_limits_of_area_and_file_size_are_passed_over(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 3)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "noise.png")
    crops = PhotoCrops(options_of(folder, min_photo_bytes=5000), 0)
    [crops.draw(index) for index in range(8)]
    assert crops.faults.count_nonzero() == 3
    with pytest.raises(ImageError, match="below the limits of area or file size"):
        PhotoCrops(options_of(folder, min_photo_area_px=48 * 64 + 1), 0)


def test_scales_and_favourites_give_a_photo_more_entries(tmp_path: Path) -> None:
    crops = PhotoCrops(
        options_of(save_photos(tmp_path / "photos", 3), photo_scales=(1.0, 0.5, 0.25), favourite_photos=("000*",)), 0
    )
    assert len(crops) == 12
    counts = Counter(int(crops.draw(index).hq[0, 0, 0]) for index in range(12 * 40))
    # the copies at 0.25 are 12 x 16 px, smaller than a crop: others are drawn in their place
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.25)
    faults = describe_faults(crops.source, crops.faults)
    assert "001.png at 0.25 (smaller than a crop)" in faults and "0.5" not in faults


def test_a_full_cache_lets_the_oldest_go_and_changes_no_crop(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 8, 400, 600)  # 0.7 MB each
    kept, small, none = (PhotoCrops(options_of(folder, photo_cache_mb=size), 0) for size in (64, 2, 0))
    for index in range(20):
        assert np.array_equal(small.draw(index).hq, kept.draw(index).hq)
        assert np.array_equal(none.draw(index).hq, kept.draw(index).hq)
    assert (len(kept.cache), len(small.cache), len(none.cache)) == (8, 2, 0)


def test_pairs_are_cut_mirrored_and_turned_alike(tmp_path: Path) -> None:
    options = options_of(save_photos(tmp_path / "photos", 1), random_rotation=True)
    hq = np.asarray(photo(1, 64, 96))
    lq = hq[::4, ::4]
    for index in range(40):
        crop = cut(type(PhotoCrops(options, 0).draw(0))(hq, lq), options, stream(0, index, purpose=Purpose.CROP))
        assert crop.lq is not None and crop.lq.shape == (4, 4, 3)
        # a pixel of lq is one of the four corners of its block of hq, after mirroring and turning
        blocks = crop.hq.reshape(4, 4, 4, 4, 3)
        assert any(np.array_equal(blocks[:, y, :, x], crop.lq) for y in (0, 3) for x in (0, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no photographs given; give one of train_data_dir, dataset_name, shards"),
        ({"train_data_dir": ("a",), "shards": "b.tar"}, "train_data_dir and shards given"),
        ({"train_data_dir": ("nowhere",)}, "nowhere: no such folder"),
        ({"lq_data_dir": "lq", "photo_scales": (1.0, 0.5)}, "photo_scales cannot be used with lq_data_dir"),
        ({"photo_scales": (0.0,)}, "positive"),
        ({"resolution": 0}, "at least 1"),
    ],
)
def test_options_that_name_no_data_or_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ImageError), match=message):
        PhotoCrops(PairOptions(**options), 0)


def test_a_folder_without_one_usable_photo_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no picture in this folder"):
        PhotoCrops(options_of(tmp_path / "empty"), 0)
    folder = save_photos(tmp_path / "photos", 2, 8, 8)
    (folder / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"no photograph can be used: .*broken\.jpg \(damaged\), .*smaller") as error:
        PhotoCrops(options_of(folder), 0)
    assert "\n" not in str(error.value)
