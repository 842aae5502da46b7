"""Canvases: latents, features and pictures of any size, kept in memory or on disk and accessed by regions."""

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from stablesr_kit.errors import OutputError

BAND_ROWS = 256


class Region(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of a canvas, both half-open."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def grown(self, halo: int, height: int, width: int) -> "Region":
        """The region with `halo` more positions on each side, clipped to a canvas of height x width."""
        return Region(
            max(self.top - halo, 0),
            max(self.left - halo, 0),
            min(self.bottom + halo, height),
            min(self.right + halo, width),
        )

    def crop(self, tensor: Tensor) -> Tensor:
        """The part (..., height, width) of a tensor of the whole canvas; a view."""
        return tensor[..., self.top : self.bottom, self.left : self.right]

    def cut_from(self, tensor: Tensor, outer: "Region") -> Tensor:
        """The part (..., height, width) of a tensor of the region `outer`, which contains this one; a view."""
        top, left = self.top - outer.top, self.left - outer.left
        return tensor[..., top : top + self.height, left : left + self.width]


def regions(height: int, width: int, side: int) -> Iterator[Region]:
    """Squares of `side` that cover height x width once, row by row; the last of a row or column may be smaller."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield Region(top, left, min(top + side, height), min(left + side, width))


@runtime_checkable
class Readable(Protocol):
    """Anything that is read like a canvas: a canvas, or something that computes regions on demand."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    def read(self, region: Region) -> Tensor:
        """Values (1, C, h, w) of a region."""


def bands(readable: Readable, rows: int = BAND_ROWS) -> Iterator[Region]:
    """Regions of full width that cover a readable, from top to bottom."""
    _, height, width = readable.shape
    return (Region(top, 0, min(top + rows, height), width) for top in range(0, height, rows))


def assembled(readable: Readable) -> Tensor:
    """All values (1, C, H, W), read in bands, which keeps temporary memory small."""
    whole: Tensor | None = None
    for band in bands(readable):
        values = readable.read(band)
        if band.height == readable.shape[1]:
            return values
        if whole is None:
            whole = values.new_empty(1, *readable.shape)
        band.crop(whole).copy_(values)
    assert whole is not None
    return whole


@dataclass(frozen=True)
class View:
    """A tensor (1, C, H, W) read like a canvas, without copies."""

    tensor: Tensor

    def __post_init__(self) -> None:
        if self.tensor.ndim != 4 or len(self.tensor) != 1:
            raise ValueError(f"a tensor of shape {tuple(self.tensor.shape)} is given, expected (1, C, H, W)")

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.tensor.shape
        return channels, height, width

    def read(self, region: Region) -> Tensor:
        return region.crop(self.tensor)


@dataclass(frozen=True)
class Resized:
    """Base of readables with another height x width than their image; subclasses implement `read`.

    Attributes:
        image: (C, h, w). height, width: of the result, in pixels.
    """

    image: Readable
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image.shape[0], self.height, self.width


@dataclass(frozen=True)
class Part:
    """A region of a readable, itself a readable."""

    whole: Readable
    region: Region

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape[0], self.region.height, self.region.width

    def read(self, region: Region) -> Tensor:
        top, left, bottom, right = region
        return self.whole.read(
            Region(self.region.top + top, self.region.left + left, self.region.top + bottom, self.region.left + right)
        )


class Canvas:
    """Values (C, H, W) in memory or on disk, zero until they are written; a file keeps resident memory bounded.

    The layout is channels-last, which suits convolutions and reading rows of a file. Without a name, the file vanishes
    with the canvas or the process, however it ends.

    Args:
        channels, height, width: its shape.
        dtype: what it stores; values are converted when they are written.
        folder: of the file; None keeps the values in memory.
        name: of a file that stays; if it exists, its values are those of the canvas.
        device: of values in memory; a canvas on "meta" has a shape but no values.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(channels, height, width) < 1:
            raise ValueError(f"a canvas of {channels} x {height} x {width} is asked for, expected at least one each")
        self.shape = (channels, height, width)
        self.dtype = dtype
        self.folder = folder
        self._values: Tensor | None = None
        self._file: IO[bytes] | None = None
        if folder is None:
            self._values = torch.zeros(height, width, channels, dtype=dtype, device=device)
            return
        try:
            if name is None:
                self._file = cast(IO[bytes], tempfile.TemporaryFile(buffering=0, dir=folder))
            else:
                (folder / name).touch()
                self._file = cast(IO[bytes], (folder / name).open("rb+", buffering=0))
            self._close_file = weakref.finalize(self, self._file.close)
            self._file.truncate(self.nbytes)
        except OSError as error:
            raise self._not_writable(error) from error

    @classmethod
    def from_tensor(cls, tensor: Tensor, folder: Path | None = None) -> Self:
        """A canvas with the values and the dtype of a tensor (1, C, H, W)."""
        canvas = cls(*View(tensor).shape, dtype=tensor.dtype, folder=folder)
        canvas.write(canvas.region, tensor)
        return canvas

    @property
    def region(self) -> Region:
        """The region of the whole canvas."""
        return Region(0, 0, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size of its values in memory or on disk."""
        channels, height, width = self.shape
        return channels * height * width * self.dtype.itemsize

    def to_tensor(self) -> Tensor:
        """All values (1, C, H, W), a copy."""
        return self.read(self.region)

    def read(self, region: Region) -> Tensor:
        """Values (1, C, h, w) of a region on the CPU, a copy in channels-last layout."""
        self._check(region)
        if self._values is not None:
            values = self._values[region.top : region.bottom, region.left : region.right].clone()
        else:
            values = torch.empty(region.height, region.width, self.shape[0], dtype=self.dtype)
            for offset, run in self._runs(region, values):
                self._open_file.seek(offset)
                while run:
                    run = run[self._open_file.readinto(run) :]  # type: ignore[attr-defined]
        return values.permute(2, 0, 1)[None]

    def write(self, region: Region, values: Tensor) -> None:
        """Put values (1, C, h, w), of any device and dtype, into a region.

        Raises:
            OutputError: the disk is full or fails.
        """
        self._check(region)
        expected = (1, self.shape[0], region.height, region.width)
        if values.shape != expected:
            raise ValueError(f"values of shape {tuple(values.shape)} are given, expected {expected}")
        rows = values.detach()[0].permute(1, 2, 0)
        if self._values is not None:
            self._values[region.top : region.bottom, region.left : region.right] = rows
            return
        try:
            for offset, run in self._runs(region, rows.to("cpu", self.dtype).contiguous()):
                self._open_file.seek(offset)
                while run:
                    run = run[self._open_file.write(run) :]
        except OSError as error:
            raise self._not_writable(error) from error

    def close(self) -> None:
        """Release the values; an unnamed file vanishes."""
        self._values = None
        if self._file is not None:
            self._close_file()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open_file(self) -> IO[bytes]:
        assert self._file is not None
        return self._file

    def _check(self, region: Region) -> None:
        if self._values is None and self._file is None:
            raise ValueError("the canvas is closed")
        _, height, width = self.shape
        if not (0 <= region.top < region.bottom <= height and 0 <= region.left < region.right <= width):
            raise ValueError(f"{region} is asked for, expected a part of the canvas of {height} x {width}")

    def _runs(self, region: Region, rows: Tensor) -> Iterator[tuple[int, memoryview]]:
        """File offset and bytes of each contiguous run of `rows` (h, w, C) in the file."""
        channels, _, width = self.shape
        data = rows.view(-1).view(torch.uint8).numpy()
        position = channels * self.dtype.itemsize
        run_positions = len(data) // position if region.width == width else region.width
        for i in range(0, region.height * region.width, run_positions):
            row = region.top + i // region.width
            start = i * position
            yield (row * width + region.left) * position, data[start : start + run_positions * position].data

    def _not_writable(self, error: OSError) -> OutputError:
        channels, height, width = self.shape
        return OutputError(
            f"a canvas of {channels} x {height} x {width} ({self.nbytes / 1e9:.1f} GB) cannot be kept in "
            f"{self.folder}: {error.strerror}; free space there or give another folder"
        )
