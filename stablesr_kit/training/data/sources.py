"""Where photographs come from: folders, pairs of folders, Hugging Face datasets. Tar shards are in `shards`."""

import fnmatch
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
