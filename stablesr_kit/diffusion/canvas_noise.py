"""Noise of a canvas as a function of seed, stage and absolute latent position: no order of computing can change it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

BLOCK = 64


class CanvasNoise:
    """Unit noise for canvases (B, C, h, w), drawn in blocks that begin at multiples of 64.

    A block is drawn by Philox (Salmon et al. 2011), keyed with seed, stage and place alone: a larger canvas has the
    same noise where it covers a smaller one, and a run that was cut off goes on with the noise it would have had.

    Args:
        seeds: one per picture of the batch, 0 or more.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)

    @classmethod
    def from_generator(
        cls, generator: torch.Generator | list[torch.Generator] | None, batch_size: int
    ) -> "CanvasNoise":
        """Seeded by the next numbers of the generator, of one per picture, or of the global one (None)."""
        if isinstance(generator, list) and len(generator) > 1:
            return cls([seed for one in generator for seed in _next_seeds(one, 1)])
        return cls(_next_seeds(generator[0] if isinstance(generator, list) else generator, batch_size))

    def draw(self, shape: Sequence[int], stage: Sequence[int]) -> Tensor:
        """Noise (B, C, h, w), float32, on the CPU; `stage` is what it is for, one or more numbers from 0.

        Raises:
            ValueError: the batch has another size than there are seeds.
        """
        batch, channels, height, width = shape
        if batch != len(self.seeds):
            raise ValueError(f"noise for {batch} pictures is asked for, expected {len(self.seeds)}, one per seed")
        noise = torch.empty(batch, channels, height, width)
        for picture, seed in zip(noise, self.seeds, strict=True):
            for top in range(0, height, BLOCK):
                for left in range(0, width, BLOCK):
                    part = picture[:, top : top + BLOCK, left : left + BLOCK]
                    block = _block(channels, (seed, *stage, top, left))
                    part.copy_(block[:, : part.shape[1], : part.shape[2]])
        return noise

    @contextmanager
    def replacing_randn(self, stage: int) -> Iterator[None]:
        """While open, the i-th `torch.randn` of a canvas is the noise of stage (stage, i).

        Schedulers and posteriors of diffusers draw their noise themselves, and few let it be given.
        """
        with _Randn(self, stage):
            yield


def drawing_from(noise: CanvasNoise | None, stage: int) -> AbstractContextManager[None]:
    """`noise.replacing_randn(stage)`, or with None the generators as ever."""
    return nullcontext() if noise is None else noise.replacing_randn(stage)


class _Randn(TorchFunctionMode):
    def __init__(self, noise: CanvasNoise, stage: int) -> None:
        super().__init__()
        self.noise, self.stage, self.drawn = noise, stage, 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not torch.randn:
            return function(*args, **kwargs)
        shape = args[0] if len(args) == 1 else args
        noise = self.noise.draw(shape, (self.stage, self.drawn))
        self.drawn += 1
        return noise.to(kwargs.get("device"), kwargs.get("dtype"))


def _next_seeds(generator: torch.Generator | None, count: int) -> list[int]:
    device = None if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


def _block(channels: int, key: tuple[int, ...]) -> Tensor:
    philox = np.random.Philox(np.random.SeedSequence(key))
    return torch.from_numpy(np.random.Generator(philox).standard_normal((channels, BLOCK, BLOCK), dtype=np.float32))
