"""Where photographs come from: nested folders, pairs, Hugging Face datasets, WebDataset shards."""

import functools
import http.server
import io
import json
import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.training.data import sources
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, describe_faults
from stablesr_kit.training.data.options import PairOptions, PhotoOptions
from stablesr_kit.training.data.pairs import PairedCrops, open_pairs
from stablesr_kit.training.data.sources import DatasetPhotos, FolderPhotos, ShardPhotos, decode
from tests.helpers.photo_files import numbers_in, photo, save_photos


def png(number: int, height: int = 48, width: int = 64) -> bytes:
    file = io.BytesIO()
    photo(number, height, width).save(file, "PNG")
    return file.getvalue()


def numbers_of(source: Any) -> list[int]:
    return [decode(source.fetch(number).hq).getpixel((0, 0))[0] for number in range(sum(source.group_sizes))]


def test_folders_are_searched_below_and_hidden_files_left_out(tmp_path: Path) -> None:
    save_photos(tmp_path / "a" / "deep", 2)
    photo(7).save(tmp_path / "a" / "first.JPG", "JPEG")
    photo(8).save(tmp_path / "a" / ".hidden.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "b").mkdir()
    photo(9).save(tmp_path / "elsewhere.png")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "deep")
    source = FolderPhotos([tmp_path / "a", tmp_path / "b"])
    assert [Path(source.name(number)).name for number in range(5)] == [
        "000.png",
        "001.png",
        "first.JPG",
        "000.png",
        "001.png",
    ]
    assert source.group_sizes == [5] and not source.is_paired


def paired_folders(tmp_path: Path) -> PairOptions:
    save_photos(tmp_path / "hq", 3)
    (tmp_path / "lq").mkdir()
    for number in range(3):
        photo(number).reduce(4).save(tmp_path / "lq" / f"{number:03d}x4.webp", lossless=True)
    return PairOptions(
        train_data_dir=(str(tmp_path / "hq"),), lq_data_dir=str(tmp_path / "lq"), lq_name_ending="x4", resolution=16
    )


def test_paired_folders_are_matched_by_name_and_enlarged_to_one_size(tmp_path: Path) -> None:
    pairs = open_pairs(paired_folders(tmp_path), 0)
    assert isinstance(pairs, PairedCrops)
    for index in range(12):
        lq, hq = pairs[index]
        assert lq.shape == hq.shape == (3, 16, 16)
        assert numbers_in(lq[None].numpy()) == numbers_in(hq[None].numpy())
        # the damaged one shows the same place: means of 4 x 4 pixels, enlarged
        assert (lq - hq).abs().max() < 2.5 / 127.5
        assert torch.equal(lq, pairs[index].lq)


def test_what_has_no_partner_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = paired_folders(tmp_path)
    (tmp_path / "lq" / "001x4.webp").rename(tmp_path / "lq" / "other.webp")
    assert len(PhotoCrops(options, 0)) == 2
    (line,) = caplog.messages
    assert line.startswith("2 pictures have no partner of their name and are left out:")
    assert "001.png" in line and "other.webp" in line
    with pytest.raises(ImageError, match="say with lq_name_ending how they end"):
        PhotoCrops(PairOptions(train_data_dir=options.train_data_dir, lq_data_dir=options.lq_data_dir), 0)


def test_pairs_refuse_what_is_for_photographs_that_are_degraded(tmp_path: Path) -> None:
    options = paired_folders(tmp_path)
    with pytest.raises(ConfigError, match="versions=2: photographs that come in pairs have one version"):
        open_pairs(options, 0, versions=2)


def test_a_pair_of_sizes_that_do_not_fit_is_not_used(tmp_path: Path) -> None:
    options = paired_folders(tmp_path)
    photo(2, 13, 16).save(tmp_path / "lq" / "002x4.webp", lossless=True)
    crops = PhotoCrops(options, 0)
    [crops.draw(index) for index in range(9)]
    assert "002.png (not a whole multiple of its partner's size)" in describe_faults(crops.source, crops.faults)
    assert crops.faults.tolist() == [0, 0, 4]


@pytest.fixture
def rows() -> datasets.Dataset:
    columns = {
        "photo": [{"bytes": png(number), "path": None} for number in range(5)] + [{"bytes": b"broken", "path": None}],
        "damaged": [{"bytes": png(number), "path": None} for number in range(6)],
        "label": list(range(6)),
    }
    features = datasets.Features(
        {"photo": datasets.Image(), "damaged": datasets.Image(), "label": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_dataset_of_save_to_disk_is_read_by_column_and_resumes(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(str(tmp_path / "saved"))
    options = PhotoOptions(dataset_name=str(tmp_path / "saved"), image_column="photo", resolution=16)
    crops = PhotoCrops(options, 0)
    whole, rest = (list(DataLoader(RandomCrops(crops), 2, sampler=range(first, 16))) for first in (0, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))
    assert numbers_in(torch.cat(whole).numpy()) == set(range(5))
    assert describe_faults(crops.source, crops.faults) == f"row 5 of {tmp_path / 'saved'} (damaged)"
    with pytest.raises(ConfigError, match=r"has no column 'image', but .*photo.*image_column"):
        PhotoCrops(PhotoOptions(dataset_name=str(tmp_path / "saved")), 0)


def test_a_dataset_of_folders_or_parquet_files_gives_photos_and_pairs(
    rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_photos(tmp_path / "pictures", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert numbers_of(DatasetPhotos(str(tmp_path / "pictures"), column="image")) == [0, 1, 2, 3]
    (tmp_path / "tables" / "data").mkdir(parents=True)
    rows.select(range(4)).to_parquet(str(tmp_path / "tables" / "data" / "train-00000-of-00001.parquet"))
    options = PairOptions(
        dataset_name=str(tmp_path / "tables"),
        image_column="photo",
        conditioning_image_column="damaged",
        resolution=16,
    )
    pairs = open_pairs(options, 0)
    assert isinstance(pairs, PairedCrops)
    assert all(torch.equal(pairs[index].lq, pairs[index].hq) for index in range(8))


def test_a_dataset_that_cannot_be_loaded_is_one_line(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "nothing").mkdir()
    for place, split in ((tmp_path / "nothing", "train"), (tmp_path / "nothing" / "at-all", "train")):
        with pytest.raises(ConfigError, match="cannot be loaded") as error:
            DatasetPhotos(str(place), split=split, column="photo")
        assert "\n" not in str(error.value)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three shards of 5, 5 and 2 samples, photo i being sample i, written by the webdataset library."""
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            writer.write({"__key__": f"{number:06d}", "png": png(number), "json": b"{}", "cls": b"1"})
    return tmp_path


def test_shards_hold_the_samples_that_webdataset_reads(tars: Path) -> None:
    source = ShardPhotos(str(tars / "set-{000..002}.tar"))
    assert source.group_sizes == [5, 5, 2]
    peer = webdataset.WebDataset([str(tars / f"set-{i:03d}.tar") for i in range(3)], shardshuffle=False)
    assert [source.fetch(number).hq for number in range(12)] == [sample["png"] for sample in peer]
    assert ShardPhotos(str(tars / "set-*.tar")).shards == source.shards
    assert source.name(7) == f"sample 2 of {tars / 'set-001.tar'}"


def test_shards_resume_at_the_exact_sample_and_are_split_by_process(tars: Path) -> None:
    options = PhotoOptions(shards=str(tars / "set-*.tar"), resolution=16)
    share = Share(batch_size=2, processes=2)
    crops = RandomCrops(PhotoCrops(options, 0, share))
    whole = [crops[index] for index in range(40)]
    resumed = RandomCrops(PhotoCrops(options, 0, share))
    assert all(torch.equal(resumed[index], whole[index]) for index in range(23, 40))
    # three shards: in every epoch of six samples each, one process reads two of them, the other one
    order = crops.crops.order
    for epoch in range(3):
        indices = range(12 * epoch, 12 * epoch + 12)
        of = [
            {int(np.searchsorted([5, 10, 12], order[i], "right")) for i in indices if i // 2 % 2 == p} for p in (0, 1)
        ]
        assert not of[0] & of[1] and len(of[0] | of[1]) >= 2


def test_shards_hold_pairs_by_their_second_name(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"a/{number}", "hq.png": png(number), "lq.png": png(number, 24, 32)})
    pairs = open_pairs(PairOptions(shards=str(tmp_path / "pairs.tar"), resolution=16), 0)
    assert isinstance(pairs, PairedCrops)
    assert all(numbers_in(pairs[i].lq[None].numpy()) == numbers_in(pairs[i].hq[None].numpy()) for i in range(8))


def test_damaged_samples_and_a_cut_shard_do_not_end_a_run(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (tars / "set-001.tar").read_bytes()
    fourth = whole.index(b"000008.")
    (tars / "set-001.tar").write_bytes(whole[: fourth + 100])
    with webdataset.TarWriter(str(tars / "set-003.tar")) as writer:
        writer.write({"__key__": "bad", "jpg": b"no picture"})
    caplog.set_level(logging.WARNING)
    crops = PhotoCrops(PhotoOptions(shards=str(tars / "set-*.tar"), resolution=16), 0)
    assert "set-001.tar is cut short after 3 samples" in caplog.text
    assert numbers_in(np.stack([crops.draw(index).hq for index in range(33)])) == {*range(8), 10, 11}
    assert describe_faults(crops.source, crops.faults) == f"sample 0 of {tars / 'set-003.tar'} (damaged)"


@pytest.fixture
def server(tars: Path) -> Iterator[str]:
    """The address of a server of the shards."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tars))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_shards_elsewhere_are_fetched_when_due_and_few_are_kept(
    tars: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "KEPT_SHARDS", 2)
    listed = [{"url": f"{server}/set-{i:03d}.tar", "nsamples": n} for i, n in enumerate([5, 5, 2])]
    (tars / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    options = PhotoOptions(shards=str(tars / "index.json"), resolution=16)
    crops = RandomCrops(PhotoCrops(options, 0))
    local = RandomCrops(PhotoCrops(PhotoOptions(shards=str(tars / "set-*.tar"), resolution=16), 0))
    loader = DataLoader(crops, 2, sampler=range(24), num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.stack([local[index] for index in range(24)]))
    source = crops.crops.source
    assert isinstance(source, ShardPhotos)
    cache = source.cache
    assert len(list(cache.glob("*.tar"))) <= 2
    del crops, loader, source
    assert not cache.exists()


def test_a_shard_that_cannot_be_fetched_makes_its_samples_unusable_and_no_more(tars: Path, server: str) -> None:
    listed = [{"url": "set-000.tar", "nsamples": 5}, {"url": f"{server}/missing.tar", "nsamples": 3}]
    (tars / "index.json").write_text(json.dumps({"shardlist": listed}))
    crops = PhotoCrops(PhotoOptions(shards=str(tars / "index.json"), resolution=16), 0)
    assert numbers_in(np.stack([crops.draw(index).hq for index in range(16)])) == set(range(5))
    assert crops.faults.tolist() == [0] * 5 + [1] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none-*.tar", None, "matches no file"),
        ("a.tar", b"no tar at all", "is no plain tar file"),
        ("index.json", b"{}", "is no index"),
        ("index.json", b'{"shardlist": []}', "lists no sample"),
        ("missing.json", None, "cannot be read"),
        ("index.json", b'{"shardlist": [{"url": "sftpx://host/a.tar", "nsamples": 2}]}', "cannot be fetched: Protocol"),
    ],
)
def test_what_is_no_shard_is_refused_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, ImageError), match=message) as error:
        ShardPhotos(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_tar_without_pictures_and_a_compressed_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("text")
    for name, mode in (("plain.tar", "w"), ("small.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(tmp_path / "note.txt", "note.txt")
    with pytest.raises(ImageError, match=r"holds no picture; its samples should be NAME\.jpg"):
        ShardPhotos(str(tmp_path / "plain.tar"))
    with pytest.raises(ImageError, match="is no plain tar file .*unpack what is compressed"):
        ShardPhotos(str(tmp_path / "small.tar.gz"))
