"""Networks from checkpoints of CodeFormer, of its VQ autoencoder and of that one's discriminator."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from stablesr_kit.checkpoints import key_maps, plans
from stablesr_kit.checkpoints.assembling import Options, assemble
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, section
from stablesr_kit.checkpoints.detecting import Hints, detect
from stablesr_kit.checkpoints.detecting_faces import codeformer_config, discriminator_config, vqgan_config
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.vqgan import VQGAN

FaceNetwork = CodeFormer | VQGAN | VQGANDiscriminator
Kind = TypeVar("Kind", CodeFormer, VQGAN, VQGANDiscriminator)


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
        hints: what shapes do not tell, where it differs from the released models.
        tensors_only, ignore: as for `convert_checkpoint`.

    Raises:
        UnsafeCheckpointError: the file needs more than tensors.
        CheckpointError: it is of another family, or a tensor is missing, left over or of another shape.
    """
    file = canonicalize(read_checkpoint(checkpoint, tensors_only=tensors_only))
    return build_face_network(file, hints=hints, options=Options(dtype, tuple(ignore)))


def load_official_faces(tensors: Mapping[str, Tensor], hints: Hints | None = None) -> FaceNetwork:
    """The network of one official module's state dict."""
    return build_face_network(section(Path("official module"), tensors), hints=hints, options=Options())


def build_face_network(file: Checkpoint, *, hints: Hints | None, options: Options) -> FaceNetwork:
    """As `convert_face_checkpoint`, from a file already read."""
    hints = hints or Hints()
    found = detect(file, hints)
    tensors = file.full_names()
    if found.family == "codeformer":
        config = codeformer_config(tensors, hints.codeformer_heads)
        modules = key_maps.codeformer_modules(config)
        return assemble(
            lambda: CodeFormer(**config),
            lambda names: plans.faces(names, modules),
            tensors,
            what="CodeFormer",
            options=options,
        )
    if found.family == "vqgan":
        config = vqgan_config(tensors, hints.latent_size)
        modules = key_maps.vqgan_modules(config)
        return assemble(
            lambda: VQGAN(**config),
            lambda names: plans.faces(names, modules),
            tensors,
            what="VQGAN",
            options=options,
        )
    if found.family == "vqgan discriminator":
        config = discriminator_config(tensors)
        return assemble(
            lambda: VQGANDiscriminator(**config),
            lambda names: plans.renaming(names, key_maps.discriminator_modules()),
            tensors,
            what="VQGAN discriminator",
            options=options,
        )
    raise CheckpointError(
        f"{file.path.name} is {found.description}; expected codeformer.pth, one of its relatives, or its VQGAN"
    )
