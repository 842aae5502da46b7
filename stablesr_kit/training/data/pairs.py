"""Pairs of a good crop of a photograph and its damaged version: as they come, or degraded when they are drawn."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import Pair, find_preset, make_pair
from stablesr_kit.imaging.degradations.filtering import resize
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.crops import PhotoCrops, Purpose
from stablesr_kit.training.data.options import DegradedPhotoOptions, PairOptions


def open_pairs(
    options: PairOptions, seed: int, share: Share | None = None, versions: int = 1
) -> "DegradedCrops | PairedCrops":
    """Pairs of the photographs that the options name: those they come in, or crops and their degraded versions.

    share: how the run deals out its samples, which keeps apart what its processes read of shards. versions: degraded
    versions of each crop. Raises ConfigError or ImageError where no photograph can be used.
    """
    crops = PhotoCrops(options, seed, share)
    if not crops.source.is_paired:
        return DegradedCrops(crops, versions)
    if versions > 1:
        raise ConfigError(f"versions={versions}: photographs that come in pairs have one version; use versions=1")
    return PairedCrops(crops)


class DegradedCrops(Dataset[Pair]):
    """Pairs (lq, hq), each (3, resolution, resolution) in [-1, 1], the low-quality one enlarged to the other's size.

    Each is degraded for itself, by a degradation drawn by the weights of the options; where that leaves something that
    is not a number, the low-quality picture is the other one. Item i is a function of (seed, i) alone. `versions`
    successive items share their crop and differ in its degradation.
    """

    def __init__(self, crops: PhotoCrops[DegradedPhotoOptions], versions: int = 1) -> None:
        self.crops = crops
        self.mixture = Mixture(crops.options)
        self.versions = versions

    def __getitem__(self, index: int) -> Pair:
        pixels = self.crops.draw(index // self.versions).hq
        draws = stream(self.crops.seed, index, purpose=Purpose.DEGRADATION)
        lq, hq = self.mixture.pair(pixels_to_image(pixels), draws)
        return Pair(lq[0], hq[0])


class Mixture:
    """The degradations of the options, each as often as they say."""

    def __init__(self, options: DegradedPhotoOptions) -> None:
        overridden: dict[str, Any] = {}
        if options.use_usm is not None:
            overridden["sharpen_target"] = options.use_usm
        if options.no_degradation_prob is not None:
            overridden["clean_probability"] = options.no_degradation_prob
        self.presets = [replace(find_preset(name), **overridden) for name in options.degradations]
        weights = np.array(list(options.degradations.values()), dtype=np.float64)
        if len(weights) == 0 or weights.min() < 0 or weights.sum() <= 0:
            raise ConfigError(f"degradations={dict(options.degradations)} must give names positive weights")
        self.probabilities = weights / weights.sum()

    def pair(self, hq: Tensor, draws: np.random.Generator) -> Pair:
        """Degraded picture and target of hq (B, 3, H, W) in [-1, 1], on its device; one degradation for the batch."""
        preset = self.presets[draws.choice(len(self.presets), p=self.probabilities)]
        lq, target = make_pair(hq, preset, torch.Generator().manual_seed(int(draws.integers(2**62))))
        return Pair(lq if lq.isfinite().all() else target, target)


class PairedCrops(Dataset[Pair]):
    """Pairs (lq, hq) as they come, each (3, resolution, resolution) in [-1, 1], a smaller lq enlarged bicubically.

    Item i is a function of (seed, i) alone.
    """

    def __init__(self, crops: PhotoCrops[PairOptions]) -> None:
        self.crops = crops

    def __getitem__(self, index: int) -> Pair:
        hq_pixels, lq_pixels, *_ = self.crops.draw(index)
        assert lq_pixels is not None  # the source is paired
        hq, lq = pixels_to_image(hq_pixels), pixels_to_image(lq_pixels)
        if lq.shape != hq.shape:
            lq = resize(lq, (hq.shape[-2], hq.shape[-1]), "bicubic").clamp(-1, 1)
        return Pair(lq[0], hq[0])
