"""Random pictures of every kind: our reader is the others', bit for bit, and what is written is read again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from PIL import Image

from stablesr_kit.imaging.reading import open_picture, read_picture
from stablesr_kit.imaging.writing import write_bands
from tests.helpers.picture_files import as_pillow, as_rgb, noise, write_png

tifffile = pytest.importorskip("tifffile")

PILLOW = ("png", "jpg", "webp", "gif", "tif", "bmp", "ppm", "jp2")


def random_picture(random: np.random.Generator) -> np.ndarray:
    dtype = np.uint8 if random.integers(2) else np.uint16
    height, width = (int(side) for side in random.integers(1, 90, 2))
    channels = int(random.choice([0, 2, 3, 4]))
    return noise(height, width, channels, dtype, seed=int(random.integers(2**31)))


@pytest.mark.parametrize("seed", range(40))
def test_tifffile_reads_the_same(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    given = random_picture(random)
    colours = given.ndim == 3 and given.shape[2] > 2
    options: dict[str, Any] = {"photometric": "rgb" if colours else "minisblack"}
    if given.ndim == 3 and given.shape[2] in (2, 4):
        options["extrasamples"] = ["unassalpha"]
    if given.ndim == 3:
        options["planarconfig"] = "contig"
    options |= [{}, {"tile": (32, 16)}, {"rowsperstrip": 3}, {"bigtiff": True}][random.integers(4)]
    options |= [{}, {"compression": "zlib"}][random.integers(2)]
    options |= {"byteorder": "<>"[random.integers(2)]}
    tifffile.imwrite(tmp_path / "in.tif", given, **options)
    theirs = tifffile.imread(tmp_path / "in.tif")
    assert np.array_equal(read_picture(tmp_path / "in.tif").pixels, as_rgb(theirs))


@pytest.mark.parametrize("seed", range(40))
def test_pillow_reads_the_same(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    given = random_picture(random).astype(np.uint8)
    ending = PILLOW[seed % len(PILLOW)]
    image = as_pillow(given)
    if ending in ("jpg", "bmp", "ppm", "gif"):
        image = image.convert("L" if image.mode in ("L", "LA") else "RGB")
    options = {"quality": int(random.integers(20, 100))} if ending in ("jpg", "webp") else {}
    image.save(tmp_path / f"in.{ending}", **options)
    with Image.open(tmp_path / f"in.{ending}") as stored:
        theirs = np.asarray(stored.convert("RGBA" if stored.has_transparency_data else "RGB"))
    assert np.array_equal(read_picture(tmp_path / f"in.{ending}").pixels, theirs)


@pytest.mark.parametrize("seed", range(20))
def test_libvips_reads_the_same_and_bands_are_the_whole(seed: int, tmp_path: Path) -> None:
    given = random_picture(np.random.default_rng(seed))
    write_png(tmp_path / "in.png", given)
    theirs = pyvips.Image.new_from_file(str(tmp_path / "in.png")).numpy()
    picture = open_picture(tmp_path / "in.png")
    assert np.array_equal(picture.pixels, as_rgb(theirs))
    assert np.array_equal(np.concatenate(list(picture.bands(1 + seed))), picture.pixels)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read_again_by_all_of_them(seed: int, ending: str, tmp_path: Path) -> None:
    given = random_picture(np.random.default_rng(seed))
    write_png(tmp_path / "in.png", given)
    source, target = read_picture(tmp_path / "in.png"), tmp_path / f"out.{ending}"
    write_bands(target, [source.pixels[..., :3]], source.height, source.width, source)
    assert np.array_equal(read_picture(target).pixels, as_rgb(given))
    theirs = tifffile.imread(target) if ending == "tif" else pyvips.Image.new_from_file(str(target)).numpy()
    assert np.array_equal(theirs.reshape(given.shape), given)
    if given.dtype == np.uint8:
        with Image.open(target) as stored:
            assert np.array_equal(np.asarray(stored), given)
