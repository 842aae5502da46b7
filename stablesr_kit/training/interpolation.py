"""Network interpolation: what a run saves lies between the network it started from and the trained one."""

from dataclasses import dataclass

import torch
from torch import nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.config import Options


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(Options):
    """How far the result goes from the network that the run started from."""

    trained_share: float = 1.0
    """What is saved is this share of the trained network and the rest of the one it started from (network
    interpolation, Wang et al. 2018, ESRGAN): between clean and textured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trained_share <= 1:
            raise ConfigError(f"trained_share={self.trained_share} must be from 0 to 1")


@torch.no_grad()
def interpolate(trained: nn.Module, first: nn.Module, options: InterpolationOptions) -> None:
    """Make `trained` share * trained + (1 - share) * first, parameter by parameter; both have the same ones."""
    for parameter, before in zip(trained.parameters(), first.parameters(), strict=True):
        parameter.lerp_(before.to(parameter), 1 - options.trained_share)
