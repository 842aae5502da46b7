"""WebDataset shards: plain tar files, in which neighbouring files of the same name form a sample.

Shards are indexed by their headers, so that any sample can be read alone and a run resumes at the exact sample. Remote
shards (https://, s3://, all that fsspec supports) are fetched whole when needed and only a few are kept, so that a set
may be larger than the disk.
"""

import bisect
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
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import fsspec
from filelock import FileLock

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.finding import SUFFIXES
from stablesr_kit.training.data.sources import StoredPhoto

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
