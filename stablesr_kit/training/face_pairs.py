"""Faces with two damaged versions: one to predict codes from, a milder one to decode."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data_options import DegradedPhotoOptions
from stablesr_kit.training.photo_crops import PhotoCrops
from stablesr_kit.training.photo_order import Draws, stream
from stablesr_kit.training.photo_pairs import Mixture


class TwiceDegraded(NamedTuple):
    """Pictures (3, H, W) in [-1, 1]: strongly damaged, lightly damaged, good."""

    large: Tensor
    small: Tensor
    hq: Tensor


class TwiceDegradedFaces(Dataset[TwiceDegraded]):
    """Faces degraded by the options' degradations and, independently, by `small_degradations`; empty: once for both.

    Item i is a function of (seed, i) alone.
    """

    def __init__(self, crops: PhotoCrops[DegradedPhotoOptions], small_degradations: Mapping[str, float]) -> None:
        self.crops = crops
        self.large = Mixture(crops.options)
        options = replace(crops.options, degradations=small_degradations)
        self.small = Mixture(options) if small_degradations else None

    def __getitem__(self, index: int) -> TwiceDegraded:
        hq = pixels_to_image(self.crops.draw(index).hq)
        draws = stream(self.crops.seed, Draws.DEGRADATION, index)
        large, target = self.large.pair(hq, draws)
        small = large if self.small is None else self.small.pair(hq, draws).lq
        return TwiceDegraded(large[0], small[0], target[0])
