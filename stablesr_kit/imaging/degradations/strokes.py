"""Brush strokes that hide parts of a picture, for learning to fill them (free-form masks, Yu et al. 2019)."""

import math

import torch
from torch import Generator, Tensor

from stablesr_kit.imaging.degradations.draws import Span, uniform

STROKES = (1, 3)
VERTICES = (8, 27)
STROKE_WIDTH_PX: Span = (30.0, 70.0)


def draw_stroke_mask(height: int, width: int, generator: Generator) -> Tensor:
    """Mask (1, height, width) on the generator's device: 1 under the strokes, 0 elsewhere.

    One to three zigzag strokes with round joints, whose steps scale with the picture and whose width is 30 to 70 px:
    those that CodeFormer's inpainting model (512 px) was trained with.
    """
    device = generator.device
    y = torch.arange(height, device=device, dtype=torch.float32).view(-1, 1)
    x = torch.arange(width, device=device, dtype=torch.float32)
    mask = torch.zeros(height, width, dtype=torch.bool, device=device)
    for _ in range(_whole(STROKES, generator)):
        radius = uniform(STROKE_WIDTH_PX, generator) / 2
        corners = _zigzag(height, width, generator)
        for (y0, x0), (y1, x1) in zip(corners, corners[1:], strict=False):
            dy, dx = y1 - y0, x1 - x0
            along = ((y - y0) * dy + (x - x0) * dx) / max(dy * dy + dx * dx, 1e-6)
            along = along.clamp(0, 1)
            mask |= torch.hypot(y - y0 - along * dy, x - x0 - along * dx) <= radius
    return mask.float()[None]


def _zigzag(height: int, width: int, generator: Generator) -> list[tuple[float, float]]:
    """Corners (y, x) of one stroke: it swings to and fro by about 2/5 of a turn, in steps of an eighth picture."""
    mean_turn = 2 * math.pi / 5
    turns = (
        mean_turn - uniform((0.0, math.pi / 6), generator),
        mean_turn + uniform((0.0, math.pi / 6), generator),
    )
    typical = math.hypot(height, width) / 8
    y, x = uniform((0.0, height), generator), uniform((0.0, width), generator)
    corners = [(y, x)]
    for index in range(_whole(VERTICES, generator)):
        angle = uniform(turns, generator)
        angle = 2 * math.pi - angle if index % 2 == 0 else angle
        normal = torch.randn((), generator=generator, device=generator.device).item()
        length = min(max(typical * (1 + normal / 2), 0.0), 2 * typical)
        y = min(max(y + length * math.sin(angle), 0.0), height)
        x = min(max(x + length * math.cos(angle), 0.0), width)
        corners.append((y, x))
    return corners


def _whole(limits: tuple[int, int], generator: Generator) -> int:
    return int(uniform((limits[0], limits[1] + 1), generator))
