"""The rule by which the CodeFormer references' weights are made from a seed, and the names they are made for.

A value depends on the seed, the official name and the shape alone, so that weights of any size need no file.
"""

import ast
import math
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

FULL_SIZE = Path(__file__).parents[1] / "goldens" / "full_size"


def fill_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The tensor of this official name."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    noise = np.random.Generator(np.random.PCG64([seed, crc32(name.encode())])).standard_normal(shape)
    if name.endswith("running_mean"):
        value = 0.1 * noise
    elif name.endswith("running_var"):
        value = 1 + 0.5 * np.abs(noise)
    elif name.endswith(("embedding.weight", "embed.weight")):
        value = noise
    elif name.endswith("position_emb"):
        value = 0.5 * noise
    elif len(shape) == 1:
        value = 0.1 * noise + name.endswith(".weight")
    else:
        value = noise / math.sqrt(math.prod(shape[1:])) * (2 if name == "idx_pred_layer.1.weight" else 1)
    return torch.from_numpy(value.astype(np.float32))


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A state dict of these official names and shapes."""
    return {name: fill_value(name, shape, seed) for name, shape in shapes.items()}


def full_size_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a module at full size: "codeformer", "vqgan", "discriminator", ..."""
    lines = (FULL_SIZE / f"keys_full_{part}.txt").read_text().splitlines()
    pairs = (line.split(" ", 1) for line in lines if not line.startswith("#"))
    return {name: tuple(ast.literal_eval(shape)) for name, shape in pairs}
