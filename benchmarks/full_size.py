"""The networks of StableSR at the size of Stable Diffusion 2.1, with random weights."""

from collections.abc import Callable
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


def unet_and_adapter(dtype: torch.dtype) -> tuple[UNet2DConditionModel, StableSRAdapter]:
    """919 M parameters with their SFT layers counted, and 52 M of the time-aware encoder."""
    unet = random_weights(lambda: UNet2DConditionModel(**SD21_UNET), dtype)
    make_steerable(unet)
    return unet, random_weights(lambda: StableSRAdapter.from_unet(unet), dtype)


def vae_and_cfw(dtype: torch.dtype) -> tuple[AutoencoderKL, ControllableFeatureWrapping]:
    """84 M parameters of the autoencoder and 44 M of CFW."""
    vae = random_weights(lambda: AutoencoderKL(**SD21_VAE), dtype)
    return vae, random_weights(lambda: ControllableFeatureWrapping.from_vae(vae), dtype)


def random_weights(build: Callable[[], Network], dtype: torch.dtype) -> Network:
    """The network without the slow initialisation: small normal weights, so that activations stay finite."""
    with torch.device("meta"):
        network = build()
    network = network.to(dtype).to_empty(device="cpu").eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in network.buffers():
        nn.init.zeros_(buffer)
    return network
