"""Where the canvases of a walk through the layers of an autoencoder lie, and what of the walk is done already."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch

from stablesr_kit.errors import JobError, OutputError
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.tiling.moments import Moments

SAME_BOOT_S = 60  # by which the clock may be set between two looks at when the machine started


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
    """

    may_overwrite = True
    """Whether a canvas may take new values while its old ones are still read."""

    def __init__(self, folder: Path | None = None, on_tiles: Callable[[int], object] = lambda _: None) -> None:
        self.folder = folder
        self.on_tiles = on_tiles

    def canvas(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Canvas:
        """A canvas (C, H, W) for the next map."""
        return Canvas(*shape, dtype=dtype, folder=self.folder)

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
        part = self._path.with_suffix(".part")
        try:
            # No fsync: the kernel keeps what a killed process wrote, and after a crash of the machine it is not used.
            part.write_bytes(saved_bytes({"made_with": self._made_with, "passes": passes}))
            os.replace(part, self._path)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror}); free space there") from error
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
                f"{self._path}: the record cannot be read ({one_reason(error)}); start again without --resume"
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


def one_reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0]
