"""Pictures that are too large or too deep to be held whole, in and out of `stablesr restore`."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from tqdm import tqdm

from stablesr_kit.cli.messages import one_line
from stablesr_kit.cli.picture_files import Job, check_result, read_job
from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.files import MAX_PIXELS, Picture
from stablesr_kit.imaging.streams import (
    MAX_STREAMED_PIXELS,
    StreamedPicture,
    check_streamed_output,
    has_streams,
    is_streamed_output,
    open_stream,
    read_header,
    write_stream,
)

if TYPE_CHECKING:
    from stablesr_kit.imaging.canvas import Readable


def open_job(job: Job, scale: float, is_huge_allowed: bool) -> Picture | StreamedPicture:
    """The job's picture: by rows if it has 16 bits, or more pixels than are read whole before or after enlarging.

    Where the formats or a missing libvips do not let it, it is held whole, in 8 bits, as long as the input is not too
    large for that. Raises StableSRKitError.
    """
    header = read_header(job.source)
    if header is None:
        return _checked(job, read_job(job), scale)
    pixels = header.height * header.width
    check_result(job, pixels * scale * scale, MAX_STREAMED_PIXELS, "give a smaller --scale")
    is_huge = pixels > MAX_PIXELS
    if is_huge and not is_huge_allowed:
        raise ImageError(
            f"{job.source}: {header.width}x{header.height} is {pixels / 1e6:.0f} million pixels, more than the limit "
            f"of {MAX_PIXELS / 1e6:g}; give --huge if you trust the file, or scale or crop it first"
        )
    is_wanted = header.is_16_bit or pixels * scale * scale > MAX_PIXELS
    if not is_huge and not (is_wanted and is_streamed_output(job.target) and has_streams()):
        picture = _checked(job, read_job(job), scale)
        if header.is_16_bit and is_streamed_output(job.target):
            _note(job, "pip install 'stablesr-kit[huge]' keeps 16 bits")
        return picture
    check_streamed_output(job.target)
    streamed = open_stream(job.source)
    for note in streamed.notes:
        _note(job, note)
    if streamed.exif is not None and job.target.suffix.lower() != ".png":
        _note(job, "EXIF is left out, since only PNG keeps it when a picture is written by rows")
    return streamed


def _checked(job: Job, picture: Picture, scale: float) -> Picture:
    """The picture, unless its result, three bytes per pixel and a copy of them, exceeds the memory there is."""
    pixels = picture.rgb.width * picture.rgb.height * scale * scale
    most = psutil.virtual_memory().total / 6
    check_result(job, pixels, most, "give a smaller --scale, or PNG, JPEG or TIFF in and PNG or TIFF out")
    return picture


def write_streamed(job: Job, restored: "Readable", source: StreamedPicture, scratch: Path) -> None:
    """Write an image (3, H, W) in [-1, 1] by rows, and beside it the comparison; unfinished files are in `scratch`."""
    from stablesr_kit.pipelines.pictures import pixel_bands

    _, height, width = restored.shape
    dtype = source.dtype.type
    write_stream(job.target, pixel_bands(restored, dtype), height, width, source, scratch)
    if job.companion:
        plain = replace(source, has_alpha=False, is_grey=False, icc_profile=None, exif=None)
        gap = max(width // 100, 1)
        pairs = _side_by_side(restored, source, gap, scratch)
        write_stream(job.companion, pairs, height, 2 * width + gap, plain, scratch)


def _side_by_side(restored: "Readable", source: StreamedPicture, gap: int, scratch: Path) -> Iterator[np.ndarray]:
    """Rows of the enlarged source, white, and of the result, as `files.side_by_side` puts them."""
    from stablesr_kit.imaging.resizing import resized
    from stablesr_kit.pipelines.pictures import pixel_bands, to_canvas

    _, height, width = restored.shape
    dtype = source.dtype.type
    enlarged = pixel_bands(resized(to_canvas(source, scratch), height, width), dtype)
    for left, right in zip(enlarged, pixel_bands(restored, dtype), strict=True):
        white = np.full((len(left), gap, 3), np.iinfo(dtype).max, dtype)
        yield np.concatenate([left, white, right], axis=1)


def _note(job: Job, note: str) -> None:
    tqdm.write(f"note: {one_line(job.source)}: {note}", file=sys.stderr)
