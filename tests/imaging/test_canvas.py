"""Canvases keep what is written, wherever it lies, and leave nothing behind."""

import gc
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stablesr_kit.errors import OutputError
from stablesr_kit.imaging.canvas import Canvas, Region, regions
from tests.helpers.file_limits import open_files
from tests.helpers.tiny import unit_noise

BACKINGS = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


@BACKINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_canvas_reads_like_the_tensor_it_stands_for(tmp_path: Path, on_disk: bool, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    expected = torch.zeros(1, 3, 23, 17, dtype=dtype)
    with Canvas(3, 23, 17, dtype=dtype, folder=tmp_path if on_disk else None) as canvas:
        assert torch.equal(canvas.to_tensor(), expected)
        for step in range(60):
            top, bottom = sorted(rng.sample(range(24), 2))
            left, right = (0, 17) if step % 5 == 0 else sorted(rng.sample(range(18), 2))
            region = Region(top, left, bottom, right)
            if step % 2:
                assert torch.equal(canvas.read(region), region.cut_from(expected, canvas.region))
            else:
                values = unit_noise(1, 3, region.height, region.width, seed=step).mul(50).abs()
                canvas.write(region, values)
                expected[..., top:bottom, left:right] = values.to(dtype)
        assert torch.equal(canvas.to_tensor(), expected)


@BACKINGS
def test_what_is_read_is_a_copy_with_the_channels_together(tmp_path: Path, on_disk: bool) -> None:
    noise = unit_noise(1, 4, 6, 5)
    with Canvas.from_tensor(noise, tmp_path if on_disk else None) as canvas:
        tile = canvas.read(Region(1, 1, 4, 5))
        assert tile.is_contiguous(memory_format=torch.channels_last)
        tile.zero_()
        assert torch.equal(canvas.to_tensor(), noise)


@pytest.mark.parametrize(("height", "width", "side"), [(1, 1, 4), (8, 8, 4), (13, 7, 4), (3, 11, 16)])
def test_regions_cover_every_position_once(height: int, width: int, side: int) -> None:
    count = torch.zeros(height, width)
    for region in regions(height, width, side):
        assert region.height <= side and region.width <= side
        count[region.top : region.bottom, region.left : region.right] += 1
    assert torch.equal(count, torch.ones(height, width))


def test_a_region_grows_to_the_border_of_its_canvas_only() -> None:
    assert Region(1, 4, 5, 8).grown(2, 6, 20) == Region(0, 2, 6, 10)


def test_no_file_is_left_after_an_error_or_when_the_canvas_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), Canvas(1, 4, 4, folder=tmp_path):
        assert open_files(tmp_path)
        raise RuntimeError("in the middle")
    assert not open_files(tmp_path)
    canvas = Canvas(1, 4, 4, folder=tmp_path)
    assert open_files(tmp_path)
    del canvas
    gc.collect()
    assert not open_files(tmp_path)
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from stablesr_kit.errors import OutputError
from stablesr_kit.imaging.canvas import Canvas, regions
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    canvas = Canvas(1, 128, 128, folder=Path(sys.argv[1]))
    for region in regions(128, 128, 32):
        canvas.write(region, torch.ones(1, 1, 32, 32))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to set on Windows")
def test_a_disk_that_fills_up_is_one_line(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"a canvas of 1 x 128 x 128 (0.0 GB) cannot be kept in {tmp_path}: ")
    assert ran.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be kept in .*: No such file or directory; free space there or give"):
        Canvas(1, 4, 4, folder=tmp_path / "missing")


@BACKINGS
def test_what_cannot_be_read_or_written_is_refused(tmp_path: Path, on_disk: bool) -> None:
    canvas = Canvas(2, 4, 4, folder=tmp_path if on_disk else None)
    with pytest.raises(ValueError, match="expected a part of the canvas of 4 x 4"):
        canvas.read(Region(0, 0, 5, 4))
    with pytest.raises(ValueError, match=r"values of shape \(1, 3, 4, 4\) are given, expected \(1, 2, 4, 4\)"):
        canvas.write(canvas.region, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="a canvas of 2 x 0 x 4 is asked for"):
        Canvas(2, 0, 4)
    with pytest.raises(ValueError, match=r"expected \(1, C, H, W\)"):
        Canvas.from_tensor(torch.zeros(2, 3, 4, 4))
    canvas.close()
    with pytest.raises(ValueError, match="the canvas is closed"):
        canvas.read(Region(0, 0, 4, 4))
