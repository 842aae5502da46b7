"""Brush strokes that hide parts of a picture, for learning to fill them (free-form masks, Yu et al. 2019)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from stablesr_kit.imaging.degradations.draws import Span, uniform

STROKES = (1, 3)
STEPS = (8, 27)
STROKE_WIDTH_PX: Span = (30.0, 70.0)


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """One line of the brush."""

    corners: tuple[tuple[int, int], ...]
    """(y, x) of each corner, in pixels."""
    width_px: int
    """Width of the line; every corner is a disc as wide."""


def draw_stroke_mask(height: int, width: int, generator: Generator) -> Tensor:
    """Mask (1, height, width) on the generator's device: 1 under the strokes, 0 elsewhere.

    One to three zigzag strokes with round joints, whose steps scale with the picture and whose width is 30 to 70 px:
    those that CodeFormer's inpainting model (512 px) was trained with.
    """
    strokes = [
        Stroke(corners=_zigzag(height, width, generator), width_px=int(uniform(STROKE_WIDTH_PX, generator)))
        for _ in range(_whole(STROKES, generator))
    ]
    return paint_strokes(height, width, strokes).to(generator.device)


def paint_strokes(height: int, width: int, strokes: Iterable[Stroke]) -> Tensor:
    """Mask (1, height, width): 1 under the strokes, 0 elsewhere."""
    mask = Image.new("L", (width, height))
    brush = ImageDraw.Draw(mask)
    for stroke in strokes:
        radius = stroke.width_px // 2
        brush.line([(x, y) for y, x in stroke.corners], fill=1, width=stroke.width_px)
        for y, x in stroke.corners:
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return torch.from_numpy(np.array(mask, np.float32))[None]


def _zigzag(height: int, width: int, generator: Generator) -> tuple[tuple[int, int], ...]:
    """Corners (y, x) of one stroke: it swings to and fro by about 2/5 of a turn, in steps of an eighth picture."""
    mean_turn = 2 * math.pi / 5
    turns = (
        mean_turn - uniform((0.0, math.pi / 6), generator),
        mean_turn + uniform((0.0, math.pi / 6), generator),
    )
    typical = math.hypot(height, width) / 8
    corners = [(_whole((0, height - 1), generator), _whole((0, width - 1), generator))]
    for index in range(_whole(STEPS, generator)):
        angle = uniform(turns, generator)
        angle = 2 * math.pi - angle if index % 2 == 0 else angle
        normal = torch.randn((), generator=generator, device=generator.device).item()
        length = min(max(typical * (1 + normal / 2), 0.0), 2 * typical)
        y, x = corners[-1]
        y = int(min(max(y + length * math.sin(angle), 0.0), height))
        x = int(min(max(x + length * math.cos(angle), 0.0), width))
        corners.append((y, x))
    return tuple(corners)


def _whole(limits: tuple[int, int], generator: Generator) -> int:
    return int(uniform((limits[0], limits[1] + 1), generator))
