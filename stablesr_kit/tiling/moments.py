"""Mean and variance of a feature map that comes in parts."""

import torch
from torch import Tensor


class Moments:
    """Mean and variance per channel of a map, exact whatever tiles it comes in: each adds its sums in float64.

    Parts are merged as by Chan, Golub and LeVeque (1983, eq. 1.5); within a part the deviations are taken from one of
    its values, so that a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(1, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(1, dtype=torch.float64)

    def add(self, tile: Tensor) -> None:
        """Take in values (1, C, h, w) that no other tile holds."""
        count = tile.shape[2] * tile.shape[3]
        first, sums, squares = (value.double().cpu() for value in sums_of(tile))
        mean = sums / count
        self._merge(count, first + mean, squares - count * mean**2)

    def of_groups(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel's group, both (C,), float64."""
        mean = self.mean.view(num_groups, -1)
        group_mean = mean.mean(1, keepdim=True)
        squares = self.squares.view(num_groups, -1) + self.count * (mean - group_mean) ** 2
        variance = squares.mean(1, keepdim=True) / self.count
        return group_mean.expand_as(mean).reshape(-1), variance.expand_as(mean).reshape(-1)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference**2 * (self.count * count / total)
        self.count = total


def sums_of(tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First value of each channel of a tile (1, C, h, w), and the sums of the deviations from it and their squares."""
    rows = tile[0].permute(1, 2, 0).float()  # (h, w, C)
    first = rows[0, 0].clone()
    deviations = rows - first
    sums = deviations.sum(1).double().sum(0)
    return first, sums, deviations.square_().sum(1).double().sum(0)
