"""A narrow AutoencoderKL that trains in minutes: how it starts, and how its latents are normalised afterwards.

With three channels per group, group normalisation erases the brightness and colour that an autoencoder must keep.
One group per layer, residual branches that start at zero, nearly linear outputs and a constant pilot signal that
dominates the statistics of the output norms avoid that.
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping

PILOT = 3.0
"""Size of the constant added to half of the channels, subtracted from the others, before an output norm."""


def build_small_autoencoder(
    block_out_channels: tuple[int, ...], latent_channels: int, layers_per_block: int
) -> AutoencoderKL:
    """Untrained autoencoder without mid-block attention that starts as a nearly linear map."""
    levels = len(block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d) or name.endswith("conv1"):
            continue
        if ".resnets." in name and name.endswith("conv2"):
            _zero(module)
        else:
            nn.init.orthogonal_(module.weight)
            _bias(module).data.zero_()
    _start_output_linear(vae.encoder.mid_block.resnets[-1].conv2, vae.encoder.conv_norm_out)
    _start_output_linear(vae.decoder.up_blocks[-1].resnets[-1].conv2, vae.decoder.conv_norm_out)
    with torch.no_grad():  # a posterior that is narrow from the start; near one, half of the channels collapse
        vae.quant_conv.weight[latent_channels:] *= 0.05
        vae.quant_conv.bias[latent_channels:] = -6.0
    return vae


@torch.no_grad()
def _start_output_linear(conv: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Send a pilot signal through the norm and take it out behind; shift SiLU into its linear part."""
    signs = torch.ones_like(_bias(conv))
    signs[1::2] = -1
    _bias(conv).copy_(PILOT * signs)
    norm.weight.fill_(math.sqrt(1 + PILOT**2))
    norm.bias.copy_(-PILOT * signs + PILOT)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change the 1x1 convolutions around the latent so that it has mean 0 and deviation 1 per channel.

    `mean` and `std`, (C,), are those of the latent so far. What the autoencoder reconstructs stays the same, and
    scaling_factor 1 is right afterwards. The posterior's log-variance moves along: it is shifted by -2 log(std).
    """
    channels = mean.numel()
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]


def start_fusion_silent(cfw: ControllableFeatureWrapping) -> None:
    """Make untrained fusion layers add almost nothing, so that training starts from the plain decode."""
    for name, module in cfw.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith(("merge.conv2", "merge.conv_shortcut", "refine.conv2")):
            _zero(module)


def _zero(conv: nn.Conv2d) -> None:
    conv.weight.data.zero_()
    _bias(conv).data.zero_()


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise ValueError("a convolution of the autoencoder has no bias; expected the stock AutoencoderKL")
    return conv.bias
