"""Networks from checkpoints of CodeFormer, of its VQGAN and of the VQGAN's discriminator."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stablesr_kit.checkpoints import key_maps
from stablesr_kit.checkpoints.assembling import AssemblyOptions, Recipes, assemble, face_recipes, renamed_recipes
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, section
from stablesr_kit.checkpoints.detecting import Config, Family, Hints, detect, face_config
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.vqgan import VQGAN

FaceNetwork = CodeFormer | VQGAN | VQGANDiscriminator


def convert_face_checkpoint(
    checkpoint: str | Path,
    *,
    hints: Hints | None = None,
    tensors_only: bool = False,
    ignore: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> FaceNetwork:
    """The network that an official file of CodeFormer's family holds, in eval mode.

    Args:
        checkpoint: codeformer.pth or one of its relatives, vqgan_code1024.pth, vqgan_discriminator.pth.
        hints: hyperparameters that shapes do not show, where they differ from the released models.
        tensors_only, ignore: as for `convert_checkpoint`.

    Raises:
        UnsafeCheckpointError: the file needs more than tensors.
        CheckpointError: it is of another family, or a tensor is missing, left over or of another shape.
    """
    file = canonicalize(read_checkpoint(checkpoint, tensors_only=tensors_only))
    return build_face_network(file, hints=hints, options=AssemblyOptions(dtype, tuple(ignore)))


def load_official_faces(tensors: Mapping[str, Tensor], hints: Hints | None = None) -> FaceNetwork:
    """The network of one official module's state dict."""
    return build_face_network(section(Path("official module"), tensors), hints=hints, options=AssemblyOptions())


class _Kind(NamedTuple):
    network: type[CodeFormer] | type[VQGAN] | type[VQGANDiscriminator]
    modules: Callable[[Config], key_maps.Modules]
    recipes: Callable[[Iterable[str], key_maps.Modules], Recipes] = face_recipes


_KINDS: Mapping[Family, _Kind] = {
    "codeformer": _Kind(CodeFormer, key_maps.codeformer_modules),
    "vqgan": _Kind(VQGAN, key_maps.vqgan_modules),
    "vqgan discriminator": _Kind(VQGANDiscriminator, lambda _: key_maps.discriminator_modules(), renamed_recipes),
}


def build_face_network(file: Checkpoint, *, hints: Hints | None, options: AssemblyOptions) -> FaceNetwork:
    """As `convert_face_checkpoint`, from a file already read."""
    hints = hints or Hints()
    found = detect(file, hints)
    kind = _KINDS.get(found.family)
    names = file.full_names()
    config = face_config(found.family, names, hints)
    if kind is None or config is None:
        raise CheckpointError(
            f"{file.path.name} is {found.description}; expected codeformer.pth, one of its relatives, or its VQGAN"
        )
    return assemble(
        lambda: kind.network(**config),
        lambda ours: kind.recipes(ours, kind.modules(config)),
        names,
        what=kind.network.__name__,
        options=options,
    )
