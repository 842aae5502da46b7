"""What tests of pipelines call and compare with."""

from typing import Any

import torch
from torch import Tensor, nn

from stablesr_kit import StableSRPipeline
from tests.helpers.tiny import seeded, tiny_picture

PICTURE = tiny_picture()


def run(pipeline: Any, image: Any = PICTURE, seed: int = 0, **arguments: Any) -> Any:
    """Images of a call: a tensor unless another type is asked for."""
    return pipeline(image=image, **{"generator": seeded(seed), "output_type": "pt", **arguments}).images


def same(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differs(one: Tensor, other: Tensor, by: float = 1e-3) -> bool:
    return (one - other).abs().max().item() > by


def contents(pipeline: StableSRPipeline) -> dict[str, Tensor]:
    """A copy of every tensor of every network."""
    networks = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
    return {f"{k}.{name}": t.clone() for k, network in networks.items() for name, t in network.state_dict().items()}
