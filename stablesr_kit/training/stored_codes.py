"""The codes of good faces, computed once by training/generate_codes.py instead of in every step."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.training.data_options import PhotoOptions
from stablesr_kit.training.photo_crops import Crop, PhotoCrops
from stablesr_kit.training.photo_sources import FolderPhotos

KINDS = {False: "orig", True: "hflip"}
"""Whether a face is mirrored -> what its codes are called after its name."""


def codes_key(path: Path, folder: str | Path, is_mirrored: bool) -> str:
    """What the codes of a face of this folder are called in the file."""
    return f"{path.relative_to(folder).with_suffix('')}/{KINDS[is_mirrored]}"


class StoredCodes:
    """The codes (h, w) of crops that are whole faces of one folder.

    Raises ConfigError where the file is none of codes, or crops may be anything but whole faces, mirrored or not.
    """

    def __init__(self, path: str | Path, crops: PhotoCrops[PhotoOptions]) -> None:
        options = crops.options
        if not isinstance(crops.source, FolderPhotos) or len(options.train_data_dir) != 1:
            raise ConfigError("codes belong to the faces of one folder; give it alone as train_data_dir")
        if options.random_rotation or options.photo_scales != (1.0,):
            raise ConfigError("codes belong to faces as they are; leave out random_rotation and photo_scales")
        try:
            self.codes = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"codes={path} cannot be read ({error}); make it with generate_codes.py") from error
        self.path, self.photos, self.folder = path, crops.source.photos, options.train_data_dir[0]

    def of(self, crop: Crop) -> Tensor:
        """Codes (h, w), int64, of a crop. Raises ConfigError if it is a part of a face or the file does not know it."""
        assert crop.number is not None  # it was drawn
        path = self.photos[crop.number].hq
        assert isinstance(path, Path)  # as all photographs of a folder
        if not crop.is_whole:
            raise ConfigError(f"{path} has another size than resolution, but codes={self.path} are of whole faces")
        key = codes_key(path, self.folder, crop.is_mirrored)
        if key not in self.codes:
            raise ConfigError(f"{path} has no codes in {self.path}; run generate_codes.py on {self.folder}")
        return self.codes[key].long()

    @torch.no_grad()
    def check(self, vqgan: VQGAN, crop: Crop) -> None:
        """Raise ConfigError unless the codes of a crop are those that this VQGAN gives it."""
        image = pixels_to_image(crop.hq).to(vqgan.device)
        found = vqgan.quantizer.nearest(vqgan.encoder(image)[0])[0].cpu()
        stored = self.of(crop)
        # Another machine rounds otherwise, and a latent between two codes may go to either.
        if stored.shape != found.shape or (stored != found).float().mean() > 0.02:
            raise ConfigError(f"codes={self.path} are not those of pretrained_vqgan; run generate_codes.py with it")
