"""Where photographs come from: folders, pairs of folders, Hugging Face datasets, WebDataset shards.

A shard is a plain tar file, in which neighbouring files of the same name form a sample. Shards are indexed by their
headers, so that any sample can be read alone and a run resumes at the exact sample. Remote shards (https://, s3://, all
that fsspec supports) are fetched whole when needed and only a few are kept, so that a set may be larger than the disk.
"""

import bisect
import fnmatch
import glob
import itertools
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from filelock import FileLock
from PIL import Image

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.finding import SUFFIXES, find_pictures
from stablesr_kit.imaging.reading import read_picture

logger = logging.getLogger(__name__)


class StoredPhoto(NamedTuple):
    """A photograph before it is decoded: a file, or its bytes."""

    hq: Path | bytes
    """The photograph."""
    lq: Path | bytes | None = None
    """Its LQ version, in paired data."""
    scale: float = 1.0
    """The size to use it at."""


class PhotoSource(Protocol):
    """Numbered photographs in groups that are best read together, such as a folder or a shard."""

    is_paired: bool
    """Whether photographs come with LQ versions."""
    group_sizes: list[int]
    """Number of photographs in each group."""

    def name(self, number: int) -> str:
        """Name of a photograph for messages."""
        ...

    def fetch(self, number: int) -> StoredPhoto:
        """The photograph. Raises ImageError."""
        ...


class FolderPhotos:
    """The photographs in folders and their subfolders, once per scale, not yet decoded.

    favourites, excluded: patterns of file names that are drawn twice as often, or left out. lq_folder: of the LQ
    versions, which have the same relative names except for the suffix and `lq_ending`, such as x4 in 0001x4.png.
    Photographs without a partner are left out and logged. Raises ImageError if a folder cannot be read, or nothing is
    left.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        scales: Sequence[float] = (1.0,),
        favourites: Sequence[str] = (),
        lq_folder: str | Path | None = None,
        lq_ending: str = "",
        excluded: Sequence[str] = (),
    ) -> None:
        if lq_folder is None:
            pairs: list[tuple[Path, Path | None]] = [(path, None) for folder in folders for path in list_photos(folder)]
        else:
            pairs = _match(folders, lq_folder, lq_ending)
        self.photos = [
            StoredPhoto(hq, lq, scale)
            for hq, lq in pairs
            if not any(fnmatch.fnmatch(hq.name, pattern) for pattern in excluded)
            for scale in scales
            for _ in range(2 if any(fnmatch.fnmatch(hq.name, pattern) for pattern in favourites) else 1)
        ]
        if not self.photos:
            raise ImageError(f"{folders[0]}: every picture in it is excluded by {', '.join(excluded)}")
        self.is_paired = lq_folder is not None
        self.group_sizes = [len(self.photos)]

    def name(self, number: int) -> str:
        photo = self.photos[number]
        return str(photo.hq) if photo.scale == 1 else f"{photo.hq!s} at {photo.scale:g}"

    def fetch(self, number: int) -> StoredPhoto:
        return self.photos[number]


def list_photos(folder: str | Path) -> list[Path]:
    """Pictures in the folder and below it, sorted; links are followed, hidden files left out. Raises ImageError."""
    found = find_pictures(Path(folder)).pictures
    if not found:
        raise ImageError(f"{folder}: no picture in this folder; expected {', '.join(sorted(SUFFIXES))}")
    return found


def _match(hq_folders: Sequence[str | Path], lq_folder: str | Path, ending: str) -> list[tuple[Path, Path | None]]:
    damaged: dict[str, Path] = {}
    for path in list_photos(lq_folder):
        key = str(path.relative_to(lq_folder).with_suffix(""))
        damaged[key.removesuffix(ending)] = path
    pairs: list[tuple[Path, Path | None]] = []
    alone: list[str] = []
    for folder in hq_folders:
        for hq in list_photos(folder):
            lq = damaged.pop(str(hq.relative_to(folder).with_suffix("")), None)
            if lq is None:
                alone.append(str(hq))
            else:
                pairs.append((hq, lq))
    alone += map(str, damaged.values())
    if alone:
        logger.warning("%d pictures have no partner of their name and are left out: %s", len(alone), some_of(alone))
    if not pairs:
        raise ImageError(
            f"no picture in {lq_folder} has the name of one in {hq_folders[0]}; "
            "give the same names, or say with lq_name_ending how they end"
        )
    return pairs


class DatasetPhotos:
    """The photographs in a column of a Hugging Face dataset, not yet decoded.

    place: a folder written by save_to_disk, anything else that `datasets.load_dataset` takes (a folder of pictures or
    parquet files, a repository). lq_column: the column of the LQ versions; None for photographs alone.
    Raises ConfigError if the dataset, its split or a column does not exist.
    """

    def __init__(
        self, place: str, *, name: str | None = None, split: str = "train", column: str, lq_column: str | None = None
    ) -> None:
        columns = [column] + ([lq_column] if lq_column is not None else [])
        self.rows = _load_dataset(place, name, split)
        for wanted in columns:
            if wanted not in self.rows.column_names:
                raise ConfigError(
                    f"{place} has no column {wanted!r}, but {', '.join(self.rows.column_names)}; "
                    "name it with image_column or conditioning_image_column"
                )
        import datasets

        self.rows = self.rows.select_columns(columns)
        for wanted in columns:
            self.rows = self.rows.cast_column(wanted, datasets.Image(decode=False))
        self.place, self.column, self.lq_column = place, column, lq_column
        self.is_paired = lq_column is not None
        self.group_sizes = [len(self.rows)]

    def name(self, number: int) -> str:
        return f"row {number} of {self.place}"

    def fetch(self, number: int) -> StoredPhoto:
        row = self.rows[number]
        lq = None if self.lq_column is None else self._cell(row[self.lq_column], number)
        return StoredPhoto(self._cell(row[self.column], number), lq)

    def _cell(self, cell: dict[str, Any] | None, number: int) -> Path | bytes:
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ImageError(f"{self.name(number)}: empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])


def _load_dataset(place: str, name: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset_name needs datasets; install it with `pip install 'stablesr-kit[train]'`") from error
    try:
        if (Path(place) / "dataset_dict.json").is_file() or (Path(place) / "state.json").is_file():
            loaded = datasets.load_from_disk(place)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(place, name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"dataset_name={place}, split {split}: cannot be loaded ({reason})") from error
    if len(rows) == 0:
        raise ConfigError(f"dataset_name={place}, split {split}: holds no row")
    return rows


def decode(stored: Path | bytes) -> Image.Image:
    """The picture, mode RGB, upright, 8 bits. Raises ImageError for anything that is not a whole picture."""
    return read_picture(stored).rgb


def some_of(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


logger = logging.getLogger(__name__)

KEPT_SHARDS = 4
"""Number of fetched shards kept on disk; more than one, since loader processes do not advance in step."""


class Member(NamedTuple):
    """Where a file lies in a tar, in bytes."""

    offset: int
    size: int


class Sample(NamedTuple):
    """A photograph in a shard and, in paired data, its LQ version."""

    hq: Member
    lq: Member | None


class ShardPhotos:
    """The photographs of WebDataset shards; each shard is a group.

    pattern: a glob pattern, a pattern with one range in braces (set-{000..127}.tar), or a JSON index as WebDataset has
    it, {"shardlist": [{"url": ..., "nsamples": ...}]}, whose urls may be elsewhere or relative to the index. A sample
    is NAME.jpg (or another picture), or the pair NAME.hq.png and NAME.lq.png.
    Raises ConfigError if there is no shard, ImageError if one is no plain tar or holds no picture.
    """

    def __init__(self, pattern: str) -> None:
        if pattern.endswith(".json"):
            self.shards, self.group_sizes = _read_index(Path(pattern))
        else:
            self.shards = _expand(pattern)
            self.group_sizes = [len(samples_of(Path(shard))) for shard in self.shards]
        self.ends = list(itertools.accumulate(self.group_sizes))
        self.cache = Path()
        elsewhere = [shard for shard in self.shards if "://" in shard]
        if elsewhere:
            _check_reachable(elsewhere[0])
            self.cache = Path(tempfile.mkdtemp(prefix="shards-"))
            weakref.finalize(self, _remove, self.cache, os.getpid())
        self.is_paired = samples_of(self._local(0))[0].lq is not None

    def name(self, number: int) -> str:
        shard, position = self._place(number)
        return f"sample {position} of {self.shards[shard]}"

    def fetch(self, number: int) -> StoredPhoto:
        shard, position = self._place(number)
        try:
            path = self._local(shard)
            samples = samples_of(path)
            if position >= len(samples):
                raise ImageError(f"{self.shards[shard]}: holds {len(samples)} samples, fewer than its index says")
            sample = samples[position]
            with path.open("rb") as file:
                hq, lq = (None if member is None else _read(file.fileno(), member) for member in sample)
        except OSError as error:
            raise ImageError(f"{self.shards[shard]}: cannot be read ({error.strerror or error})") from error
        if hq is None or (lq is None) == self.is_paired:
            raise ImageError(f"{self.name(number)}: has no partner")
        return StoredPhoto(hq, lq)

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a photograph, and its position there."""
        shard = bisect.bisect_right(self.ends, number)
        return shard, number - (self.ends[shard] - self.group_sizes[shard])

    def _local(self, shard: int) -> Path:
        """The shard as a file of this machine, fetched if it lies elsewhere. Raises OSError."""
        url = self.shards[shard]
        if "://" not in url:
            return Path(url)
        path = self.cache / f"{shard:08d}.tar"
        with FileLock(self.cache / "lock"):
            if path.exists():
                path.touch()
                return path
            files, remote = fsspec.url_to_fs(url)
            try:
                files.get_file(remote, str(path.with_suffix(".part")))
            except Exception as error:  # each kind of store fails in its own way
                raise OSError(f"cannot be fetched: {error}") from error
            path.with_suffix(".part").rename(path)
            latest = sorted(self.cache.glob("*.tar"), key=lambda file: file.stat().st_mtime)
            for old in latest[:-KEPT_SHARDS]:
                old.unlink()
        return path


@lru_cache(maxsize=4096)
def samples_of(path: Path) -> tuple[Sample, ...]:
    """The samples of a shard, by its headers alone. Raises ImageError if it is no plain tar or holds no picture."""
    members: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for entry in tar:
                    parent, name = os.path.split(entry.name)
                    key, _, suffix = name.partition(".")
                    if entry.isfile() and f".{suffix.rpartition('.')[2]}".lower() in SUFFIXES:
                        members.setdefault(f"{parent}/{key}", {})[suffix] = Member(entry.offset_data, entry.size)
            except tarfile.ReadError as error:
                logger.warning("%s is cut short after %d samples: %s", path, len(members), error)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{path}: is no plain tar file ({error}); unpack what is compressed") from error
    samples = []
    for suffixes in members.values():
        parts = {suffix.partition(".")[0] if "." in suffix else "only": member for suffix, member in suffixes.items()}
        hq = parts.get("hq", parts.get("only"))
        if hq is not None:
            samples.append(Sample(hq, parts.get("lq")))
    if not samples:
        raise ImageError(f"{path}: holds no picture; its samples should be NAME.jpg, or NAME.hq.png and NAME.lq.png")
    return tuple(samples)


def _expand(pattern: str) -> list[str]:
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if braces is None:
        found = sorted(glob.glob(pattern))
    else:
        before, first, last, after = braces.groups()
        found = [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
    if not found:
        raise ConfigError(f"shards={pattern} matches no file; give a pattern such as set-*.tar or set-{{000..127}}.tar")
    if any("://" in shard for shard in found):
        raise ConfigError(
            f"shards={pattern} lies elsewhere; give the JSON index that says how many samples are in each"
        )
    return found


def _read_index(path: Path) -> tuple[list[str], list[int]]:
    try:
        listed = json.loads(path.read_text())["shardlist"]
        shards = [(str(shard["url"]), int(shard["nsamples"])) for shard in listed if int(shard["nsamples"]) > 0]
    except OSError as error:
        raise ConfigError(f"shards={path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'shards={path} is no index; expected {{"shardlist": [{{"url", "nsamples"}}]}}') from error
    if not shards:
        raise ConfigError(f"shards={path} lists no sample")
    urls = [url if "://" in url else str(path.parent / url) for url, _ in shards]
    return urls, [count for _, count in shards]


def _check_reachable(url: str) -> None:
    try:
        fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"shards such as {url} cannot be fetched: {error}") from error


def _read(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not when a worker that inherited the object ends
        shutil.rmtree(folder, ignore_errors=True)
