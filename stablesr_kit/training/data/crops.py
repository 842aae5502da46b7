"""Random crops of photographs; item i depends on the seed and i only.

A run that was interrupted therefore resumes at the exact crop, with any number of workers. Photographs are decoded when
they are drawn. Unusable ones are replaced by others, counted, and listed at the end of the run.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ImageError
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.options import PhotoOptions, open_source
from stablesr_kit.training.data.sources import PhotoSource, decode, some_of

logger = logging.getLogger(__name__)

Chosen_co = TypeVar("Chosen_co", bound=PhotoOptions, covariant=True)

CHECKED_AT_START = 64
"""At least one of the first photographs, this many, must be usable."""

MOST_REDRAWS = 1000
"""Most unusable photographs in a row."""


class Purpose(IntEnum):
    """What random numbers are for: each purpose has a stream of its own, independent of the others."""

    GROUPS = 0
    MEMBERS = 1
    CROP = 2
    DEGRADATION = 3
    BATCH = 4
    STEP = 5


class Fault(IntEnum):
    """Why a photograph is not used."""

    DAMAGED = 1
    SMALL = 2
    PASSED_OVER = 3
    UNEQUAL = 4


FAULTS = {
    Fault.DAMAGED: "damaged",
    Fault.SMALL: "smaller than a crop",
    Fault.PASSED_OVER: "below the limits of area or file size",
    Fault.UNEQUAL: "not a whole multiple of its partner's size",
}


class Crop(NamedTuple):
    """Pixels of a square crop (resolution, resolution, 3), and of its LQ version, which may be smaller."""

    hq: np.ndarray
    lq: np.ndarray | None
    number: int | None = None
    """Number of its photograph in the source; None: unknown."""
    is_mirrored: bool = False
    is_whole: bool = True
    """Whether it is the whole photograph, not turned."""


class PhotoCrops(Generic[Chosen_co]):
    """Random square crops of the photographs that the options name.

    `draw(i)` depends on seed and i only. Raises ConfigError or ImageError if no photograph can be used.
    """

    def __init__(self, options: Chosen_co, seed: int, share: Share | None = None) -> None:
        self.options = options
        self.seed = seed
        self.source = open_source(options)
        self.order = EpochOrder(self.source.group_sizes, seed, share or Share())
        # one byte per photograph: loader processes write it, the main process reads it
        self.faults = torch.zeros(sum(self.source.group_sizes), dtype=torch.uint8).share_memory_()
        self.cache: OrderedDict[int, Crop] = OrderedDict()
        self.cached_bytes = 0
        if all(self._photo(number) is None for number in range(min(len(self), CHECKED_AT_START))):
            raise ImageError(f"no photograph can be used: {describe_faults(self.source, self.faults)}")

    def __len__(self) -> int:
        """Number of photographs; each counts once per scale."""
        return len(self.faults)

    def draw(self, index: int) -> Crop:
        """The crop of an index; if its photograph cannot be used, a crop of another one."""
        random = stream(self.seed, index, purpose=Purpose.CROP)
        number = self.order[index]
        for _ in range(MOST_REDRAWS):
            photo = self._photo(number)
            if photo is not None:
                return cut(photo, self.options, random)._replace(number=number)
            others = self.order.group_of(number)
            if self.faults[others.start : others.stop].all():
                others = range(len(self))
            number = others[random.integers(len(others))]
        raise ImageError(f"{MOST_REDRAWS} photographs in turn cannot be used, the last is {self.source.name(number)}")

    def _photo(self, number: int) -> Crop | None:
        """The whole photograph; None if it cannot be used, and its fault is recorded."""
        if number in self.cache:
            self.cache.move_to_end(number)
            return self.cache[number]
        if self.faults[number]:
            return None
        found = self._decoded(number)
        if isinstance(found, Fault):
            self.faults[number] = int(found)
            return None
        self.cache[number] = found
        self.cached_bytes += size_of(found)
        while self.cached_bytes > self.options.photo_cache_mb * 2**20:
            self.cached_bytes -= size_of(self.cache.popitem(last=False)[1])
        return found

    def _decoded(self, number: int) -> Crop | Fault:
        options = self.options
        try:
            stored = self.source.fetch(number)
            file_size = len(stored.hq) if isinstance(stored.hq, bytes) else stored.hq.stat().st_size
            if file_size < options.min_photo_bytes:
                return Fault.PASSED_OVER
            picture = decode(stored.hq)
            lq = None if stored.lq is None else np.asarray(decode(stored.lq))
        except (ImageError, OSError):
            return Fault.DAMAGED
        width, height = (max(1, round(length * stored.scale)) for length in picture.size)
        if width * height < options.min_photo_area_px:
            return Fault.PASSED_OVER
        if options.small_photos == "skip" and min(width, height) < options.resolution:
            return Fault.SMALL
        hq = np.asarray(picture if stored.scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS))
        if lq is not None:
            factor = hq.shape[0] // lq.shape[0]
            if factor < 1 or hq.shape != (factor * lq.shape[0], factor * lq.shape[1], 3) or options.resolution % factor:
                return Fault.UNEQUAL
        return Crop(hq, lq)


def cut(photo: Crop, options: PhotoOptions, random: np.random.Generator) -> Crop:
    """A random square of the photograph and the same square of its LQ version, mirrored and turned alike.

    A smaller photograph is first continued by reflection to the right and below.
    """
    factor = 1 if photo.lq is None else photo.hq.shape[0] // photo.lq.shape[0]
    side = options.resolution // factor
    hq = continued(photo.hq, options.resolution)
    top, left = (factor * int(random.integers((length - options.resolution) // factor + 1)) for length in hq.shape[:2])
    turns = int(random.integers(4)) if options.random_rotation else 0
    is_mirrored = options.random_flip and bool(random.integers(2))

    def finish(pixels: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
        part = np.rot90(pixels[top : top + side, left : left + side], turns)
        return np.ascontiguousarray(part[:, ::-1] if is_mirrored else part)

    lq = photo.lq
    if lq is not None:
        lq = finish(continued(lq, side), top // factor, left // factor, side)
    is_whole = photo.hq.shape[:2] == (options.resolution, options.resolution) and turns == 0
    return Crop(finish(hq, top, left, options.resolution), lq, is_mirrored=is_mirrored, is_whole=is_whole)


def continued(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pixels (H, W, 3), padded to at least `side` rows and columns by reflection without repeating the edge."""
    missing = [(0, max(0, side - length)) for length in pixels.shape[:2]]
    return np.pad(pixels, [*missing, (0, 0)], mode="reflect") if any(after for _, after in missing) else pixels


def size_of(photo: Crop) -> int:
    """Size of a decoded photograph, in bytes."""
    return photo.hq.nbytes + (0 if photo.lq is None else photo.lq.nbytes)


def describe_faults(source: PhotoSource, faults: Tensor) -> str:
    """Which photographs were not used, and why, on one line; empty if all were. faults: (photographs,), uint8."""
    numbers = sorted(faults.nonzero().flatten().tolist(), key=lambda number: int(faults[number]))
    told = [f"{source.name(number)} ({FAULTS[Fault(int(faults[number]))]})" for number in numbers]
    return some_of(told)


def report_skipped(crops: PhotoCrops[PhotoOptions], accelerator: Accelerator | None = None) -> None:
    """Log, on one line, which photographs any process has skipped so far, and why. All processes must call it.

    accelerator: of the run; None in a program with a single process.
    """
    faults = crops.faults
    if accelerator is not None:
        faults = accelerator.gather(faults[None].to(accelerator.device)).amax(0).cpu()
    if faults.any() and (accelerator is None or accelerator.is_main_process):
        count = int(faults.count_nonzero())
        logger.warning(
            "%d of %d photographs were skipped: %s", count, len(crops), describe_faults(crops.source, faults)
        )


class RandomCrops(Dataset[Tensor]):
    """Crops as images (3, resolution, resolution) in [-1, 1]."""

    def __init__(self, crops: PhotoCrops[PhotoOptions]) -> None:
        self.crops = crops

    def __getitem__(self, index: int) -> Tensor:
        return pixels_to_image(self.crops.draw(index).hq)[0]


class EpochOrder:
    """The photograph at each index: each occurs once per epoch, and every epoch has another random order.

    The photographs of a group stay together. If there are at least as many groups as processes, each process has its
    own groups; an epoch then takes the same number of photographs from each process, so some are repeated or left to
    another epoch.
    """

    def __init__(self, group_sizes: Sequence[int], seed: int, share: Share) -> None:
        self.group_sizes = np.array(group_sizes)
        self.starts = np.cumsum(self.group_sizes) - self.group_sizes
        self.seed = seed
        self.share = share if len(group_sizes) >= share.processes else Share()
        self.epoch_length = math.ceil(int(self.group_sizes.sum()) / self.share.processes)
        self.drawn: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        batch, place = divmod(index, self.share.batch_size)
        turn, process = divmod(batch, self.share.processes)
        epoch, position = divmod(turn * self.share.batch_size + place, self.epoch_length)
        if (epoch, process) not in self.drawn:
            self.drawn = {(epoch, process): self._draw(epoch, process)}
        return int(self.drawn[epoch, process][position])

    def group_of(self, number: int) -> range:
        """Numbers of all photographs in the group of a photograph."""
        group = int(np.searchsorted(self.starts, number, side="right")) - 1
        return range(int(self.starts[group]), int(self.starts[group] + self.group_sizes[group]))

    def _draw(self, epoch: int, process: int) -> np.ndarray:
        groups = stream(self.seed, epoch, purpose=Purpose.GROUPS).permutation(len(self.group_sizes))
        numbers = []
        for group in groups[process :: self.share.processes]:
            members = stream(self.seed, epoch, group, purpose=Purpose.MEMBERS).permutation(self.group_sizes[group])
            numbers.append(self.starts[group] + members)
        return np.resize(np.concatenate(numbers), self.epoch_length)
