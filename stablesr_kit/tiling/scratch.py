"""Where a walk through the layers of an autoencoder keeps its canvases, and how far it has come."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch
from torch import Tensor

from stablesr_kit.errors import JobError, OutputError, reason_of
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.storage import replacing_file

SAME_BOOT_S = 60  # by which the clock may be set between two looks at when the machine started


class Moments:
    """Mean and variance per channel of a map, summed over its tiles in float64.

    Parts are merged as in Chan, Golub and LeVeque (1983, eq. 1.5). In each part, deviations are taken from one of its
    values, so that a large mean loses no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(1, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(1, dtype=torch.float64)

    @classmethod
    def of_zeros(cls, channels: int) -> "Moments":
        """Moments of a map without values, for counting."""
        moments = cls()
        moments.add(torch.zeros(1, channels, 1, 1))
        return moments

    def add(self, tile: Tensor) -> None:
        """Add the values (1, C, h, w) of a tile; tiles do not overlap."""
        count = tile.shape[2] * tile.shape[3]
        first, sums, squares = (value.double().cpu() for value in sums_of(tile))
        mean = sums / count
        self._merge(count, first + mean, squares - count * mean**2)

    def of_groups(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel's group, both (C,), float64."""
        mean = self.mean.view(num_groups, -1)
        group_mean = mean.mean(1, keepdim=True)
        squares = self.squares.view(num_groups, -1) + self.count * (mean - group_mean) ** 2
        variance = squares.mean(1, keepdim=True) / self.count
        return group_mean.expand_as(mean).reshape(-1), variance.expand_as(mean).reshape(-1)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference**2 * (self.count * count / total)
        self.count = total


@dataclass
class Sweep:
    """One pass over the tiles of a map: how many are done, and their moments."""

    done: int = 0
    moments: Moments = field(default_factory=Moments)
    dtype: torch.dtype = torch.float32


class Scratch:
    """Canvases that live as long as they are used; no progress is recorded.

    Args:
        folder: for the canvases; None keeps them in memory.
        on_tiles: called with the number of tiles done since the last call.
        device: of canvases in memory; "meta" is for counting, without values.
    """

    may_overwrite = True
    """Whether a canvas may be overwritten while it is still read."""

    def __init__(
        self,
        folder: Path | None = None,
        on_tiles: Callable[[int], object] = lambda _: None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = folder
        self.on_tiles = on_tiles
        self.device = device

    def canvas(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Canvas:
        """A canvas (C, H, W) for the next map."""
        return Canvas(*shape, dtype=dtype, folder=self.folder, device=self.device)

    def begin(self) -> Sweep:
        """Begin the next pass."""
        return Sweep()

    def save(self) -> None:
        """Note that one more tile of the current pass is on its canvas."""
        self.on_tiles(1)


class Record(Scratch):
    """Scratch that outlives its process: after a kill, the same walk goes on where this one stopped.

    Every process has the same passes and canvases in the same order. A canvas is deleted when no later pass reads it,
    and never overwritten, so that the tile in progress during the kill can be computed again.

    Args:
        folder: for this walk alone; files of another walk are deleted.
        made_with: all settings that decide what is computed, as plain values.
        on_tiles: as in `Scratch`; tiles of an earlier process are reported when their pass begins.

    Raises:
        JobError: the record is damaged.
        OutputError: the folder cannot be written.
    """

    may_overwrite = False

    def __init__(
        self, folder: Path, made_with: Mapping[str, Any], on_tiles: Callable[[int], object] = lambda _: None
    ) -> None:
        super().__init__(folder, on_tiles)
        self._path = folder / "record.pt"
        # What was written shortly before a machine went down may be lost although the record of it is not.
        self._made_with = {**made_with, "booted_s": psutil.boot_time()}
        self._begun = 0
        self._made = 0
        self._alive: WeakValueDictionary[str, Canvas] = WeakValueDictionary()
        self._sweeps = self._recorded()
        if not self._sweeps:
            self._empty()

    def canvas(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Canvas:
        """A canvas (C, H, W) for the next map, with the tiles it already has."""
        for path in folder_canvases(self._folder):
            if int(path.stem) < self._made and path.name not in self._alive:
                path.unlink(missing_ok=True)
        name = f"{self._made}.canvas"
        self._made += 1
        canvas = Canvas(*shape, dtype=dtype, folder=self._folder, name=name)
        self._alive[name] = canvas
        return canvas

    def begin(self) -> Sweep:
        """Begin the next pass, which may be partly done."""
        if self._begun == len(self._sweeps):
            self._sweeps.append(Sweep())
        sweep = self._sweeps[self._begun]
        self._begun += 1
        if sweep.done:
            self.on_tiles(sweep.done)
        return sweep

    def save(self) -> None:
        """Write down that one more tile of the current pass is on its canvas."""
        passes = [(sweep.done, vars(sweep.moments), sweep.dtype) for sweep in self._sweeps]
        # Not synced: the kernel keeps what a killed process wrote, and after a crash of the machine it is not used.
        with replacing_file(self._path, is_synced=False) as part:
            part.write_bytes(saved_bytes({"made_with": self._made_with, "passes": passes}))
        super().save()

    @property
    def _folder(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _recorded(self) -> list[Sweep]:
        """The passes of an earlier process; none if they were made with other settings."""
        if not self._path.exists():
            return []
        try:
            saved = torch.load(self._path, weights_only=True)
            made_with, now = dict(saved["made_with"]), dict(self._made_with)
            is_same_boot = abs(made_with.pop("booted_s") - now.pop("booted_s")) < SAME_BOOT_S
            if not is_same_boot or made_with != now:
                return []
            sweeps = []
            for done, measured, dtype in saved["passes"]:
                moments = Moments()
                vars(moments).update(measured)
                sweeps.append(Sweep(done, moments, dtype))
            return sweeps
        except Exception as error:  # the unpickler meets damaged bytes with errors of every kind
            raise JobError(
                f"{self._path}: the record cannot be read ({reason_of(error)}); start again without --resume"
            ) from error

    def _empty(self) -> None:
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be made ({error.strerror}); choose another place") from error


def folder_canvases(folder: Path) -> list[Path]:
    """The files of a record's canvases."""
    return list(folder.glob("*.canvas"))


def saved_bytes(values: dict[str, Any]) -> memoryview:
    """The bytes that torch.save writes. Torch's own file writer does not say why it fails."""
    buffer = BytesIO()
    torch.save(values, buffer)
    return buffer.getbuffer()


def sums_of(tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First value of each channel of a tile (1, C, h, w), and the sums of the deviations from it and their squares."""
    rows = tile[0].permute(1, 2, 0).float()  # (h, w, C)
    first = rows[0, 0].clone()
    deviations = rows - first
    sums = deviations.sum(1).double().sum(0)
    return first, sums, deviations.square_().sum(1).double().sum(0)
