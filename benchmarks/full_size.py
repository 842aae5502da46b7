"""The networks of StableSR at the size of Stable Diffusion 2.1, with random weights; and the same, tiny."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.steering import make_steerable
from stablesr_kit.models.time_aware_encoder import StableSRAdapter

SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD21_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Configs of the four networks."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    adapter: dict[str, Any] = field(default_factory=dict)
    cfw: dict[str, Any] = field(default_factory=dict)


FULL = Size(unet=SD21_UNET, vae=SD21_VAE)
"""919 M parameters of the UNet with its SFT layers, 52 M of the time-aware encoder, 84 M of the autoencoder, 44 M of
CFW."""
TINY = Size(
    unet={
        "sample_size": 8,
        "block_out_channels": (16, 32, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": (2, 4, 4, 4),
        "use_linear_projection": True,
    },
    vae={**SD21_VAE, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    adapter={
        "block_out_channels": (16,) * 4,
        "layers_per_block": 1,
        "num_attention_heads": 2,
        "norm_num_groups": 8,
        "cond_channels": 16,
        "hidden_channels": 8,
    },
    cfw={"num_rrdb": 1, "growth_channels": 4},
)
"""The same levels and kinds of blocks, for a test of a benchmark."""


def unet_and_adapter(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: Size = FULL
) -> tuple[UNet2DConditionModel, StableSRAdapter]:
    """The UNet, steerable, and an adapter for it."""
    unet = random_weights(lambda: UNet2DConditionModel(**size.unet), dtype, device)
    make_steerable(unet)
    return unet, random_weights(lambda: StableSRAdapter.from_unet(unet, **size.adapter), dtype, device)


def vae_and_cfw(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: Size = FULL
) -> tuple[AutoencoderKL, ControllableFeatureWrapping]:
    """The autoencoder, and CFW for it."""
    vae = random_weights(lambda: AutoencoderKL(**size.vae), dtype, device)
    return vae, random_weights(lambda: ControllableFeatureWrapping.from_vae(vae, **size.cfw), dtype, device)


def random_weights(build: Callable[[], Network], dtype: torch.dtype, device: torch.device | str = "cpu") -> Network:
    """The network without the slow initialisation: small normal weights, so that activations stay finite."""
    with torch.device("meta"):
        network = build()
    network = nn.Module.to(network, dtype).to_empty(device=device).eval()  # that of diffusers warns of every cast
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in network.buffers():
        nn.init.zeros_(buffer)
    return network
