"""Faces with two damaged versions: one to predict codes from, a milder one to decode; and their codes, if stored."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import ClassicalConfig, DegradationConfig
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data_options import DegradedPhotoOptions
from stablesr_kit.training.photo_crops import PhotoCrops
from stablesr_kit.training.photo_order import Draws, stream
from stablesr_kit.training.photo_pairs import Mixture
from stablesr_kit.training.stored_codes import StoredCodes


class TwiceDegraded(NamedTuple):
    """Pictures (3, H, W) in [-1, 1]: strongly damaged, lightly damaged, good; and the codes (h, w) of the good one."""

    large: Tensor
    small: Tensor
    hq: Tensor
    codes: Tensor
    """Empty if they are not stored."""


class TwiceDegradedFaces(Dataset[TwiceDegraded]):
    """Faces degraded by the options' degradations and, independently, by `small_degradations`; empty: once for both.

    Item i is a function of (seed, i) alone. Raises ConfigError where codes are stored and a degradation changes the
    good face, so that they would not be its own.
    """

    def __init__(
        self,
        crops: PhotoCrops[DegradedPhotoOptions],
        small_degradations: Mapping[str, float],
        stored: StoredCodes | None = None,
    ) -> None:
        self.crops = crops
        self.stored = stored
        self.large = Mixture(crops.options)
        options = replace(crops.options, degradations=small_degradations)
        self.small = Mixture(options) if small_degradations else None

        changing = [preset for preset in self.large.presets if preset.sharpen_target or is_recoloured(preset)]
        if stored is not None and changing:
            raise ConfigError("codes are of faces as they are, but a degradation changes its target; leave out codes")

    def __getitem__(self, index: int) -> TwiceDegraded:
        crop = self.crops.draw(index)
        hq = pixels_to_image(crop.hq)
        draws = stream(self.crops.seed, Draws.DEGRADATION, index)
        large, target = self.large.pair(hq, draws)
        small = large if self.small is None else self.small.pair(hq, draws).lq
        codes = torch.empty(0, dtype=torch.int64) if self.stored is None else self.stored.of(crop)
        return TwiceDegraded(large[0], small[0], target[0], codes)


def is_recoloured(preset: DegradationConfig) -> bool:
    """Whether the target loses its colour with the picture."""
    return isinstance(preset, ClassicalConfig) and preset.grey_target and preset.grey_probability > 0
