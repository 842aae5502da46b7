"""Random choices from an explicit generator, on whatever device the generator lives."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

Span = tuple[float, float]


def uniform(span: Span, generator: Generator) -> float:
    """One number from [span[0], span[1])."""
    low, high = span
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def uniform_each(span: Span, count: int, generator: Generator) -> Tensor:
    """`count` independent numbers from [span[0], span[1]), shape (count,), on the generator's device."""
    low, high = span
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def chance(probability: float, generator: Generator) -> bool:
    """True with the given probability."""
    return uniform((0.0, 1.0), generator) < probability


def pick(weights: Sequence[float], generator: Generator) -> int:
    """An index, drawn in proportion to its weight; the weights need not sum to one."""
    point = uniform((0.0, float(sum(weights))), generator)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def odd_size(sizes: tuple[int, int], generator: Generator) -> int:
    """An odd number from sizes[0] to sizes[1], both odd and both possible."""
    smallest, largest = sizes
    return smallest + 2 * int(uniform((0.0, (largest - smallest) // 2 + 1), generator))
