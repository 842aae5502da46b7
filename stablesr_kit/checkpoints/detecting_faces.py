"""The configs of CodeFormer, of its VQ autoencoder and of that one's discriminator, from names and shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stablesr_kit.checkpoints.lookups import indices, shape
from stablesr_kit.errors import CheckpointError

Config = dict[str, Any]

RELEASED_LATENT_SIZE = 16
RELEASED_HEADS = 8
KINDS: Mapping[str, str] = {
    "conv1.weight": "residual",
    "proj_out.weight": "attention",
    "conv.weight": "downsampling",
}
"""What a tensor of a block says of it; the other blocks are single layers."""


def codeformer_config(names: Mapping[str, Tensor], heads: int | None = None) -> Config:
    """Arguments of CodeFormer. heads: None means those of the released models; no shape tells them."""
    what = "CodeFormer"
    positions, dim = shape(names, "position_emb", what)
    latent_size = math.isqrt(positions)
    if latent_size**2 != positions:
        raise CheckpointError(f"{what} has {positions} positions, expected the number of a square")
    config = vqgan_config(names, latent_size)
    if config.pop("quantization") != "nearest":
        raise CheckpointError(f"{what} has a Gumbel quantizer, expected the nearest one")
    return config | {
        "dim": dim,
        "num_heads": heads or RELEASED_HEADS,
        "num_layers": 1 + max(indices(names, r"^ft_layers\.(\d+)\."), default=-1),
        "fuse_sizes": tuple(sorted(indices(names, r"^fuse_convs_dict\.(\d+)\.scale\.0\.weight$"))),
    }


def vqgan_config(names: Mapping[str, Tensor], latent_size: int | None = None) -> Config:
    """Arguments of VQGAN. latent_size: side of the latent, of which the picture's is a multiple; None means 16."""
    what = "the VQGAN"
    is_gumbel = "quantize.embed.weight" in names
    codes = shape(names, "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", what)
    base_channels = shape(names, "encoder.blocks.0.weight", what)[0]
    levels = _levels(names, what)
    image_size = (latent_size or RELEASED_LATENT_SIZE) * 2 ** (len(levels) - 1)
    widths = [shape(names, f"encoder.blocks.{blocks[0]}.conv1.weight", what)[0] for blocks, _ in levels]
    depths = {len(blocks) for blocks, _ in levels}
    if len(depths) != 1 or any(width % base_channels for width in widths):
        raise CheckpointError(f"{what} has levels of {sorted(depths)} blocks and widths {widths} over {base_channels}")
    return {
        "image_size": image_size,
        "base_channels": base_channels,
        "channel_multipliers": tuple(width // base_channels for width in widths),
        "layers_per_block": depths.pop(),
        "attention_resolutions": tuple(image_size // 2**i for i, (_, is_attended) in enumerate(levels) if is_attended),
        "codebook_size": codes[0],
        "code_channels": codes[1],
        "quantization": "gumbel" if is_gumbel else "nearest",
    }


def _levels(names: Mapping[str, Tensor], what: str) -> list[tuple[list[int], bool]]:
    """Of each level of the encoder: the numbers of its residual blocks, and whether attention follows them."""
    kinds: dict[int, str] = {}
    for name in names:
        block = re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", name)
        if block and block[2] in KINDS:
            kinds[int(block[1])] = KINDS[block[2]]
    body = sorted(kinds)[:-3]  # the middle is a residual block, attention, and a residual block
    levels: list[tuple[list[int], bool]] = [([], False)]
    for number in body:
        blocks, _ = levels[-1]
        if kinds[number] == "residual":
            blocks.append(number)
        elif kinds[number] == "attention":
            levels[-1] = (blocks, True)
        else:
            levels.append(([], False))
    if not all(blocks for blocks, _ in levels):
        raise CheckpointError(f"{what} has a level without residual blocks; the file is incomplete")
    return levels


def discriminator_config(names: Mapping[str, Tensor]) -> Config:
    """Arguments of VQGANDiscriminator."""
    base_channels, in_channels = shape(names, "main.0.weight", "the discriminator")[:2]
    norms = indices(names, r"^main\.(\d+)\.running_mean$")
    return {"in_channels": in_channels, "base_channels": base_channels, "num_layers": len(norms)}
