"""Scenes that move, for what follows motion."""

import torch
from torch import Tensor

from tests.helpers.tiny import seeded


def scene(right: float = 0.0, down: float = 0.0, side: int = 48, seed: int = 0) -> Tensor:
    """Smooth texture (3, side, side) in [-1, 1], moved by so many pixels."""
    waves = torch.rand(12, 4, generator=seeded(seed))
    y, x = torch.meshgrid(torch.arange(side) - float(down), torch.arange(side) - float(right), indexing="ij")
    total = sum(
        (
            torch.sin(x * (0.1 + 0.7 * a) + 6 * c) * torch.cos(y * (0.1 + 0.7 * b) + 6 * d)
            for a, b, c, d in waves.tolist()
        ),
        start=torch.zeros(side, side),
    )
    return (total / total.abs().max()).expand(3, -1, -1).clone()
