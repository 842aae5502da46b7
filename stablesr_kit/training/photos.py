"""Folders of photographs held in memory, and crops of them that depend on a seed and an index alone."""

import fnmatch
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ImageError
from stablesr_kit.spaces import pixels_to_image

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def load_photos(
    folder: str | Path, *, min_side_px: int, scales: Iterable[float] = (1.0,), favourites: Iterable[str] = ()
) -> list[np.ndarray]:
    """Pixels of the folder's photographs, each once per scale; names that match a favourite pattern count twice.

    A reduced copy hides the compression of small JPEG files. Copies whose shorter side is below `min_side_px`
    are left out; files that cannot be read are skipped and named in the log. Raises ImageError when none is left.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    photos: list[np.ndarray] = []
    for path in files:
        try:
            picture = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            logger.warning("%s is skipped: %s", path.name, error)
            continue
        repeats = 2 if any(fnmatch.fnmatch(path.name, pattern) for pattern in favourites) else 1
        for scale in scales:
            size = (round(picture.width * scale), round(picture.height * scale))
            if min(size) >= min_side_px:
                copy = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
                photos += [np.asarray(copy)] * repeats
    if not photos:
        raise ImageError(f"{folder} holds no readable picture with both sides of at least {min_side_px} px")
    return photos


class RandomCrops(Dataset[Tensor]):
    """Square crops (3, crop_px, crop_px) in [-1, 1], each turned and mirrored at random.

    Item i is a function of (seed, i) alone: a run that was interrupted goes on at the exact crop.
    """

    def __init__(self, photos: list[np.ndarray], crop_px: int, seed: int) -> None:
        self.photos = photos
        self.crop_px = crop_px
        self.seed = seed

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng((self.seed, index))
        return pixels_to_image(random_crop(self.photos, self.crop_px, random))[0]


def random_crop(photos: list[np.ndarray], crop_px: int, random: np.random.Generator) -> np.ndarray:
    """Pixels of a square crop of one of the photos, turned and mirrored at random."""
    photo = photos[random.choice(len(photos))]
    top = random.integers(photo.shape[0] - crop_px + 1)
    left = random.integers(photo.shape[1] - crop_px + 1)
    crop = np.rot90(photo[top : top + crop_px, left : left + crop_px], int(random.integers(4)))
    return (crop[:, ::-1] if random.integers(2) else crop).copy()
