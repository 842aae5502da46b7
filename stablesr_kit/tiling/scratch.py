"""Where the canvases of a walk through the layers of an autoencoder lie, and what of the walk is done already."""

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
    """Mean and variance per channel of a map, exact whatever tiles it comes in: each adds its sums in float64.

    Parts are merged as by Chan, Golub and LeVeque (1983, eq. 1.5); within a part the deviations are taken from one of
    its values, so that a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(1, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(1, dtype=torch.float64)

    @classmethod
    def of_zeros(cls, channels: int) -> "Moments":
        """Of a map without values, for those who only count."""
        moments = cls()
        moments.add(torch.zeros(1, channels, 1, 1))
        return moments

    def add(self, tile: Tensor) -> None:
        """Take in values (1, C, h, w) that no other tile holds."""
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
    """One pass over the tiles of a map: how many are computed, and what was measured on them."""

    done: int = 0
    moments: Moments = field(default_factory=Moments)
    dtype: torch.dtype = torch.float32


class Scratch:
    """Canvases that are gone with whoever holds them; nothing is recorded.

    Args:
        folder: where the canvases are; None keeps them in memory.
        on_tiles: called with the number of tiles that are done since it was called last.
        device: of canvases in memory; on "meta" they have no values, for those who only count.
    """

    may_overwrite = True
    """Whether a canvas may take new values while its old ones are still read."""

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
        """The next pass, to be filled in tile by tile."""
        return Sweep()

    def save(self) -> None:
        """The last pass that began has one more tile, and the canvases hold it."""
        self.on_tiles(1)


class Record(Scratch):
    """A walk that outlives its process: after a kill another one takes the same steps and finds them done.

    Passes and canvases come in the same order in every process, and a canvas is deleted once nothing can read it any
    more, so that what a later pass needs is there. Canvases are never overwritten: the tile in work when the process
    dies is computed again from what it was computed from.

    Args:
        folder: for this walk alone; what is there of another is deleted.
        made_with: all, beside what is coded, that decides what is computed, as plain values.
        on_tiles: as for any scratch; those of an earlier process are told when their pass begins.

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
        """A canvas (C, H, W) for the next map, with the values it has already."""
        for path in folder_canvases(self._folder):
            if int(path.stem) < self._made and path.name not in self._alive:
                path.unlink(missing_ok=True)
        name = f"{self._made}.canvas"
        self._made += 1
        canvas = Canvas(*shape, dtype=dtype, folder=self._folder, name=name)
        self._alive[name] = canvas
        return canvas

    def begin(self) -> Sweep:
        """The next pass, as far as it is done."""
        if self._begun == len(self._sweeps):
            self._sweeps.append(Sweep())
        sweep = self._sweeps[self._begun]
        self._begun += 1
        if sweep.done:
            self.on_tiles(sweep.done)
        return sweep

    def save(self) -> None:
        """Record that the last pass has one more tile, which the canvases hold."""
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
        """The passes of an earlier process; none if what is there was made otherwise."""
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
    """What torch.save writes, to be written by whoever can say what fails; torch's own writer cannot."""
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
