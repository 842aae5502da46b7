"""Unit noise that moves with a clip and stays white: every grain belongs to a point of the scene.

The grains lie four to a latent position in each direction. Each has a number; what it is at a stage is a function of
seed, stage, channel and number, so that a frame's noise for all stages is known from its grains' numbers. This is the
aim of integral noise (Chang et al. 2024) by other means: no grain is ever used twice, hence no correlation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.diffusion.canvas_noise import CanvasNoise
from stablesr_kit.video.motion import Motion, resized_flow

GRAINS = 4
"""Per latent position, in each direction."""


@dataclass(frozen=True)
class Grains:
    """The grains of one frame.

    numbers: (H, W), int64, H and W being those of the latents times GRAINS. offsets: (2, H, W), float32, where in its
    cell each lies, across and down from the centre. count: of all grains up to now.
    """

    numbers: Tensor
    offsets: Tensor
    count: int

    @classmethod
    def first(cls, height: int, width: int) -> "Grains":
        """Of a frame with latents of height x width that follows none."""
        rows, columns = height * GRAINS, width * GRAINS
        return cls(torch.arange(rows * columns).view(rows, columns), torch.zeros(2, rows, columns), rows * columns)

    def moved(self, motion: Motion) -> "Grains":
        """Of the next frame: where several grains meet, the one nearest the centre stays; new ones fill gaps."""
        rows, columns = self.numbers.shape
        x = torch.arange(columns) + self.offsets[0]
        y = torch.arange(rows)[:, None] + self.offsets[1]
        step = resized_flow(motion.forth, rows, columns)
        places = torch.stack([x + step[0], y + step[1]]).flatten(1).numpy()
        cells = np.rint(places).astype(np.int64)
        is_inside = ((cells >= 0) & (cells < np.array([[columns], [rows]]))).all(0)
        places, cells, old = places[:, is_inside], cells[:, is_inside], self.numbers.flatten().numpy()[is_inside]
        offsets = (places - cells).astype(np.float32)
        index = cells[1] * columns + cells[0]
        order = np.lexsort((old, np.square(offsets).sum(0), index))
        taken, first = np.unique(index[order], return_index=True)
        chosen = order[first]
        numbers = np.full(rows * columns, -1)
        numbers[taken] = old[chosen]
        gaps = numbers < 0
        numbers[gaps] = self.count + np.arange(gaps.sum())
        lying = np.zeros((2, rows * columns), np.float32)
        lying[:, taken] = offsets[:, chosen]
        return Grains(
            torch.from_numpy(numbers).view(rows, columns),
            torch.from_numpy(lying).view(2, rows, columns),
            self.count + int(gaps.sum()),
        )


class MovingNoise(CanvasNoise):
    """`CanvasNoise` of frames, made of their grains: what a stage draws for a canvas (B, C, h, w).

    Args:
        seed: 0 or more. grains: of each frame.
    """

    def __init__(self, seed: int, grains: Sequence[Grains]) -> None:
        super().__init__([seed] * len(grains))
        self.grains = list(grains)

    def draw(self, shape: Sequence[int], stage: Sequence[int]) -> Tensor:
        batch, channels, height, width = shape
        expected = len(self.grains), *(side // GRAINS for side in self.grains[0].numbers.shape)
        if (batch, height, width) != expected:
            raise ValueError(f"noise of shape {tuple(shape)} is asked for, expected {expected} without the channels")
        noise = torch.empty(batch, channels, height, width)
        for picture, seed, grains in zip(noise, self.seeds, self.grains, strict=True):
            for channel in range(channels):
                fine = _normal(grains.numbers.numpy(), (seed, *stage, channel))
                picture[channel] = torch.from_numpy(fine.reshape(height, GRAINS, width, GRAINS).sum((1, 3)) / GRAINS)
        return noise


def _normal(numbers: NDArray[np.int64], key: tuple[int, ...]) -> NDArray[np.float32]:
    """Unit noise of numbered grains: SplitMix64 (Steele et al. 2014) at two places each, by Box and Muller."""
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    index = numbers.astype(np.uint64) * np.uint64(2)
    one, two = ((_mixed(start, index + np.uint64(i)) >> np.uint64(11)) * 2.0**-53 for i in (1, 2))
    return (np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * two)).astype(np.float32)


def _mixed(start: np.uint64, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = start + index * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
