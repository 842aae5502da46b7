"""A narrow VQGAN that takes its outer levels from a trained AutoencoderKL: only the inner ones start from nothing.

The outer levels of both are alike: convolution, residual blocks, sampling by two. What differs is the activation before
the autoencoder's last convolution, which is replaced by the nearest linear map, and the second residual block of every
outer level of its decoder, of which all but the innermost are left out.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.vqgan import VQGAN, Quantized


class GraftedVQGAN(nn.Module):
    """A VQGAN of one residual block per level whose outer levels are those of `vae`, frozen.

    Args:
        vqgan: untrained; its first levels are as wide as those of the autoencoder. Changed in place.
        vae: the trained autoencoder.
        images: (B, 3, H, W) in [-1, 1], on which its last activation is linearised.

    Raises:
        ConfigError: the widths differ, or either has no single block per level of the encoder.
    """

    def __init__(self, vqgan: VQGAN, vae: AutoencoderKL, images: Tensor) -> None:
        super().__init__()
        widths = [vqgan.config.base_channels * multiplier for multiplier in vqgan.config.channel_multipliers]
        self.outer = len(vae.config.block_out_channels)
        if widths[: self.outer] != list(vae.config.block_out_channels) or len(widths) == self.outer:
            raise ConfigError(
                f"the autoencoder's widths {tuple(vae.config.block_out_channels)} must be the first of the VQGAN's "
                f"{tuple(widths)}; choose base_channels and channel_multipliers so"
            )
        if vae.config.layers_per_block != 1 or vqgan.config.layers_per_block != 1:
            raise ConfigError("both the autoencoder and the VQGAN must have layers_per_block 1")
        self.vqgan = vqgan
        self.inner = len(widths) - self.outer
        start_residuals_at_zero(vqgan)
        self._take_encoder(vae)
        self._take_decoder(vae, images)
        trained = nn.ModuleList(
            [
                *vqgan.encoder.downsamplers[self.outer - 1 :],
                *vqgan.encoder.levels[self.outer :],
                vqgan.encoder.middle,
                vqgan.encoder.norm_out,
                vqgan.encoder.conv_out,
                vqgan.quantizer,
                vqgan.decoder.conv_in,
                vqgan.decoder.middle,
                *vqgan.decoder.levels[: self.inner + 1],
                *vqgan.decoder.upsamplers[: self.inner],
            ]
        )
        vqgan.requires_grad_(False)
        trained.requires_grad_(True)

    def forward(self, h: Tensor, is_quantized: bool) -> tuple[Tensor, Quantized]:
        """Features (B, c, h, w) for the outer decoder, of those of the outer encoder, through codes or around them."""
        decoder = self.vqgan.decoder
        z = self.encode(h)
        quantized = self.vqgan.quantizer(z)
        h = decoder.middle(decoder.conv_in(quantized.features if is_quantized else z))
        for i in range(self.inner):
            h = decoder.upsamplers[i](decoder.levels[i](h))
        return decoder.levels[self.inner](h), quantized

    def encode(self, h: Tensor) -> Tensor:
        """The latent, from features of the outer encoder."""
        encoder = self.vqgan.encoder
        for i in range(self.outer, self.outer + self.inner):
            h = encoder.levels[i](encoder.downsamplers[i - 1](h))
        latent: Tensor = encoder.conv_out(encoder.norm_out(encoder.middle(h)))
        return latent

    def outer_encode(self, image: Tensor) -> Tensor:
        """What the inner levels are given of image (B, 3, H, W) in [-1, 1]."""
        encoder = self.vqgan.encoder
        h = encoder.conv_in(image)
        for i in range(self.outer):
            h = encoder.levels[i](encoder.downsamplers[i - 1](h) if i else h)
        return h

    def _take_encoder(self, vae: AutoencoderKL) -> None:
        ours, theirs = self.vqgan.encoder, vae.encoder
        _copy(theirs.conv_in, ours.conv_in)
        for i, block in enumerate(theirs.down_blocks):
            _copy(block.resnets[0], ours.get_submodule(f"levels.{i}.resnets.0"))
            if block.downsamplers:
                _copy(block.downsamplers[0], ours.downsamplers[i])

    @torch.no_grad()
    def _take_decoder(self, vae: AutoencoderKL, images: Tensor) -> None:
        ours, theirs = self.vqgan.decoder, vae.decoder
        for i, block in enumerate(theirs.up_blocks):
            if i:
                _copy(block.resnets[0], ours.get_submodule(f"levels.{self.inner + i}.resnets.0"))
            if block.upsamplers:
                _copy(block.upsamplers[0], ours.upsamplers[self.inner + i])
        _copy(theirs.conv_norm_out, ours.norm_out)
        _copy(theirs.conv_out, ours.conv_out)
        h = target_features(vae, images)
        for i in range(self.inner, self.inner + self.outer - 1):
            h = ours.levels[i + 1](ours.upsamplers[i](h))
        x = rearrange(ours.norm_out(h), "b c h w -> c (b h w)")
        y = F.silu(x)
        centred = x - x.mean(1, keepdim=True)
        slope = (centred * y).sum(1) / centred.square().sum(1)
        ours.norm_out.weight.mul_(slope)
        ours.norm_out.bias.mul_(slope).add_(y.mean(1) - slope * x.mean(1))


@torch.no_grad()
def target_features(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """What the outer decoder is best given for image (B, 3, H, W) in [-1, 1], by the autoencoder."""
    z = vae.encode(image).latent_dist.mean
    h = vae.decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    h = vae.decoder.mid_block(h)
    for resnet in vae.decoder.up_blocks[0].resnets:
        h = resnet(h, None)
    return h


@torch.no_grad()
def start_residuals_at_zero(vqgan: VQGAN) -> None:
    """Every residual block starts as its shortcut and every other convolution orthogonal: narrow nets learn sooner."""
    for name, module in vqgan.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith("conv1"):
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _copy(theirs: nn.Module, ours: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())
