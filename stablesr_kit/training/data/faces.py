"""Faces with two LQ versions, one to predict codes from and a milder one for fusion, and stored codes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations import ClassicalConfig, DegradationConfig
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data.crops import Crop, PhotoCrops, Purpose
from stablesr_kit.training.data.options import DegradedPhotoOptions, PhotoOptions
from stablesr_kit.training.data.pairs import Mixture
from stablesr_kit.training.data.sources import FolderPhotos


def codes_key(path: Path, folder: str | Path, is_mirrored: bool) -> str:
    """Name of a face's codes in the file of codes."""
    return f"{path.relative_to(folder).with_suffix('')}/{'hflip' if is_mirrored else 'orig'}"


class StoredCodes:
    """The codes (h, w) of whole faces of one folder.

    Raises ConfigError if the file holds no codes, or the options allow crops other than whole faces, mirrored or not.
    """

    def __init__(self, path: str | Path, crops: PhotoCrops[PhotoOptions]) -> None:
        options = crops.options
        if not isinstance(crops.source, FolderPhotos) or len(options.train_data_dir) != 1:
            raise ConfigError("codes belong to the faces of one folder; give it alone as train_data_dir")
        if options.random_rotation or options.photo_scales != (1.0,):
            raise ConfigError("codes are of unchanged faces; leave out random_rotation and photo_scales")
        try:
            self.codes = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"codes={path} cannot be read ({error}); make it with generate_codes.py") from error
        self.path, self.photos, self.folder = path, crops.source.photos, options.train_data_dir[0]

    def of(self, crop: Crop) -> Tensor:
        """Codes (h, w), int64, of a crop. Raises ConfigError for a part of a face, or a face without stored codes."""
        assert crop.number is not None  # it was drawn
        path = self.photos[crop.number].hq
        assert isinstance(path, Path)  # photographs of a folder are files
        if not crop.is_whole:
            raise ConfigError(f"{path} has another size than resolution, but codes={self.path} are of whole faces")
        key = codes_key(path, self.folder, crop.is_mirrored)
        if key not in self.codes:
            raise ConfigError(f"{path} has no codes in {self.path}; run generate_codes.py on {self.folder}")
        return self.codes[key].long()

    @torch.no_grad()
    def check(self, vqgan: VQGAN, crop: Crop) -> None:
        """Raise ConfigError unless this VQGAN gives the crop the stored codes."""
        image = pixels_to_image(crop.hq).to(vqgan.device)
        found = vqgan.quantizer.nearest(vqgan.encoder(image)[0])[0].cpu()
        stored = self.of(crop)
        # Rounding differs between machines, and may decide between two codes.
        if stored.shape != found.shape or (stored != found).float().mean() > 0.02:
            raise ConfigError(f"codes={self.path} are not those of pretrained_vqgan; run generate_codes.py with it")


class TwiceDegraded(NamedTuple):
    """Pictures (3, H, W) in [-1, 1]: strongly degraded, mildly degraded, HQ; and the codes (h, w) of the HQ one."""

    strong: Tensor
    mild: Tensor
    hq: Tensor
    codes: Tensor
    """Empty if no codes are stored."""


class TwiceDegradedFaces(Dataset[TwiceDegraded]):
    """Faces degraded by the options' degradations and, independently, by `mild_degradations`; empty: one for both.

    Item i depends on (seed, i) only. Raises ConfigError if codes are stored but a degradation changes the HQ face, so
    that they do not fit.
    """

    def __init__(
        self,
        crops: PhotoCrops[DegradedPhotoOptions],
        mild_degradations: Mapping[str, float],
        stored: StoredCodes | None = None,
    ) -> None:
        self.crops = crops
        self.stored = stored
        self.strong = Mixture(crops.options)
        options = replace(crops.options, degradations=mild_degradations)
        self.mild = Mixture(options) if mild_degradations else None

        changing = [preset for preset in self.strong.presets if preset.sharpen_target or is_recoloured(preset)]
        if stored is not None and changing:
            raise ConfigError("codes are of unchanged faces, but a degradation changes its target; leave out codes")

    def __getitem__(self, index: int) -> TwiceDegraded:
        crop = self.crops.draw(index)
        hq = pixels_to_image(crop.hq)
        draws = stream(self.crops.seed, index, purpose=Purpose.DEGRADATION)
        strong, target = self.strong.pair(hq, draws)
        mild = strong if self.mild is None else self.mild.pair(hq, draws).lq
        codes = torch.empty(0, dtype=torch.int64) if self.stored is None else self.stored.of(crop)
        return TwiceDegraded(strong[0], mild[0], target[0], codes)


def is_recoloured(preset: DegradationConfig) -> bool:
    """Whether a grey LQ picture gets a grey HQ picture."""
    return isinstance(preset, ClassicalConfig) and preset.grey_target and preset.grey_probability > 0
