"""Training data computed beforehand: latents, pairs, and samples of a pipeline."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.imaging.degradations import Pair
from stablesr_kit.seeds import stream
from stablesr_kit.spaces import pixels_to_image
from stablesr_kit.storage import replacing_file
from stablesr_kit.training.run.config import ProgramConfig


class CachedLatents(Dataset[Pair]):
    """Random square crops of the latent pairs in a file from cache_latents.py.

    Item i depends on (seed, i) only. Raises ConfigError if the crops are larger than the cached latents,
    CheckpointError for another file.
    """

    def __init__(self, file: str | Path, crop: int, seed: int) -> None:
        self.hq, self.lq = read_tensors(file, "hq", "lq")  # (N, C, h, w), (N, versions, C, h, w)
        if crop > min(self.hq.shape[-2:]):
            raise ConfigError(f"latent_crop={crop} is larger than the cached latents, {tuple(self.hq.shape[-2:])}")
        self.crop = crop
        self.seed = seed

    def __getitem__(self, index: int) -> Pair:
        random = stream(self.seed, index)
        which, version = random.integers(self.lq.shape[0]), random.integers(self.lq.shape[1])
        top = random.integers(self.hq.shape[-2] - self.crop + 1)
        left = random.integers(self.hq.shape[-1] - self.crop + 1)
        part = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        return Pair(self.lq[which, version][part].float(), self.hq[which][part].float())


class CachedPairs(Dataset[Pair]):
    """Random square crops (3, crop_px, crop_px), in [-1, 1], of the pairs in a file from cache_pairs.py.

    Item i depends on (seed, i) only. Raises ConfigError if the crops are larger than the cached pairs,
    CheckpointError for another file.
    """

    def __init__(self, file: str | Path, crop_px: int, seed: int) -> None:
        self.hq, self.lq = read_tensors(file, "hq", "lq")  # (N, H, W, 3) uint8
        if crop_px > min(self.hq.shape[1:3]):
            raise ConfigError(f"resolution={crop_px} is larger than the cached pairs, {tuple(self.hq.shape[1:3])}")
        self.crop_px = crop_px
        self.seed = seed

    def __getitem__(self, index: int) -> Pair:
        random = stream(self.seed, index)
        which = random.integers(len(self.hq))
        top = random.integers(self.hq.shape[1] - self.crop_px + 1)
        left = random.integers(self.hq.shape[2] - self.crop_px + 1)
        rows, columns = slice(top, top + self.crop_px), slice(left, left + self.crop_px)
        lq, hq = (pixels_to_image(pixels[which, rows, columns].numpy())[0] for pixels in (self.lq, self.hq))
        return Pair(lq, hq)


class RestoredCrop(NamedTuple):
    """Training sample for CFW: pictures (3, crop_px, crop_px) in [-1, 1], and the restored latent (C, h, w)."""

    lq: Tensor
    latent: Tensor
    hq: Tensor


class RestoredCrops(Dataset[RestoredCrop]):
    """Random square crops of the samples in a file from generate_cfw_data.py.

    Item i depends on (seed, i) only. Raises ConfigError if the crops do not fit the samples,
    CheckpointError for another file.
    """

    def __init__(self, file: str | Path, crop_px: int, seed: int) -> None:
        self.hq, self.lq, self.latents = read_tensors(file, "hq", "lq", "latents")
        side_px = min(self.hq.shape[1:3])
        self.factor = side_px // self.latents.shape[-1]
        if crop_px % self.factor or crop_px > side_px:
            raise ConfigError(f"resolution={crop_px} must be a multiple of {self.factor} of at most {side_px}")
        self.crop_px = crop_px
        self.seed = seed

    def __getitem__(self, index: int) -> RestoredCrop:
        random = stream(self.seed, index)
        which, factor = random.integers(len(self.hq)), self.factor
        size = self.crop_px // factor
        top = random.integers(self.latents.shape[-2] - size + 1)
        left = random.integers(self.latents.shape[-1] - size + 1)
        rows, columns = slice(top * factor, (top + size) * factor), slice(left * factor, (left + size) * factor)
        return RestoredCrop(
            pixels_to_image(self.lq[which, rows, columns].numpy())[0],
            self.latents[which, :, top : top + size, left : left + size].float(),
            pixels_to_image(self.hq[which, rows, columns].numpy())[0],
        )


def read_tensors(file: str | Path, *names: str) -> list[Tensor]:
    """The tensors of these names in a weight file. Raises CheckpointError if one, or the file, is missing."""
    content = read_checkpoint(file).content
    tensors = [tensor for tensor in map(content.get, names) if isinstance(tensor, Tensor)]
    if len(tensors) < len(names):
        raise CheckpointError(f"{file} holds {', '.join(content)}; expected {', '.join(names)}, as the programs write")
    return tensors


logger = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Name of the file that says what the parts were computed from."""


class TensorParts:
    """The parts of a file of tensors, kept in a folder beside it until all are complete.

    file: written by `join`. Parts of an interrupted call are used if they were made with the same options and the same
    files in the folder `model` (None if no model is used); others are deleted. Raises OutputError if the disk is full.
    """

    def __init__(self, file: Path, config: ProgramConfig, model: Path | None) -> None:
        self.file = file
        self.folder = file.with_name(f"{file.name}.parts")
        files = [] if model is None else [path for path in sorted(model.rglob("*")) if path.is_file()]
        stamps = {str(path.relative_to(str(model))): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        origin = json.dumps({"options": asdict(config), "model": stamps}, indent=1)
        note = self.folder / ORIGIN
        if self.folder.exists() and not (note.exists() and note.read_text() == origin):
            logger.warning("%s holds parts of another model or other options, which are deleted", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(origin)

    def __contains__(self, number: int) -> bool:
        """Whether this part exists."""
        return self._path(number).exists()

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part atomically."""
        _save(tensors, self._path(number))

    def join(self, count: int) -> dict[str, Tensor]:
        """Write parts 0, ..., count - 1 as one file, concatenated along their first dimension; returns its tensors."""
        parts = [load_file(self._path(number)) for number in range(count)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        _save(whole, self.file)
        shutil.rmtree(self.folder)
        return whole

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    with replacing_file(file) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
