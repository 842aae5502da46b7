"""Pictures and generators for tests of the degradations."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def photo_like(batch: int = 1, height: int = 96, width: int = 112, seed: int = 0) -> Tensor:
    """Smooth colour fields with sharp edges and some grain, (B, 3, H, W) in [0, 1]."""
    generator = seeded(seed)
    fields = F.interpolate(torch.rand(batch, 3, 6, 7, generator=generator), (height, width), mode="bicubic")
    edges = F.interpolate(torch.rand(batch, 1, 5, 5, generator=generator), (height, width), mode="nearest")
    grain = torch.randn(batch, 3, height, width, generator=generator)
    return (0.7 * fields + 0.25 * edges + 0.01 * grain).clamp(0, 1)
