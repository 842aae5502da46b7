"""Tensors that a program computes part by part: each is on disk as soon as it is there, at the end all in one file."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stablesr_kit.training.checkpoints import UNFINISHED
from stablesr_kit.training.config import ProgramConfig
from stablesr_kit.training.writing import writing

logger = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Name of the file that says what the parts were computed from."""


class TensorParts:
    """The parts of a file of tensors, kept in a folder beside it until all are there.

    Raises OutputError where there is no room for them.

    file: what `join` writes. Parts that an interrupted call left are used if they have the same origin: these options,
    and the same files in the folder `model`; others are deleted.
    """

    def __init__(self, file: Path, config: ProgramConfig, model: Path) -> None:
        self.file = file
        self.folder = file.with_name(f"{file.name}.parts")
        stamps = {
            str(path.relative_to(model)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(model.rglob("*"))
            if path.is_file()
        }
        origin = json.dumps({"options": asdict(config), "model": stamps}, indent=1)
        note = self.folder / ORIGIN
        if self.folder.exists() and not (note.exists() and note.read_text() == origin):
            logger.warning("%s holds parts of another model or other options, which are deleted", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(origin)

    def __contains__(self, number: int) -> bool:
        """Whether this part is there."""
        return self._path(number).exists()

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part; it appears whole."""
        _save(tensors, self._path(number))

    def join(self, count: int) -> dict[str, Tensor]:
        """Write parts 0, ..., count - 1 as one file, concatenated along their first dimension; what is in it."""
        parts = [load_file(self._path(number)) for number in range(count)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        _save(whole, self.file)
        shutil.rmtree(self.folder)
        return whole

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    beside = file.with_name(file.name + UNFINISHED)
    with writing(file):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        beside.rename(file)
