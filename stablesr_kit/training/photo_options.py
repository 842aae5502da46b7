"""Options of every program that takes crops of photographs."""

from dataclasses import dataclass

import numpy as np

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.photos import load_photos


@dataclass(frozen=True, kw_only=True)
class PhotoOptions:
    """Which photographs, and how large their crops are."""

    train_data_dir: str | None = None
    """Folder of photographs."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Every photograph is used once at each of these sizes."""
    favourite_photos: tuple[str, ...] = ()
    """Patterns of file names that are drawn twice as often."""
    resolution: int = 64
    """Side of the square crops in px."""

    def load_photos(self) -> list[np.ndarray]:
        """Pixels of the photographs. Raises ConfigError without a folder, ImageError when nothing in it is usable."""
        if self.train_data_dir is None:
            raise ConfigError("train_data_dir must be given, in --config FILE or as --train_data_dir FOLDER")
        return load_photos(
            self.train_data_dir,
            min_side_px=self.resolution,
            scales=self.photo_scales,
            favourites=self.favourite_photos,
        )
