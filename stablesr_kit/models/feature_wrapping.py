"""Controllable feature wrapping (CFW): the LQ picture's fidelity in the decoder (Wang et al. 2023, eq. 5)."""

from typing import Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

RESIDUAL_SCALE = 0.2


class ResidualDenseBlock(nn.Module):
    """Five densely connected 3x3 convolutions (Wang et al. 2018, ESRGAN, sec. 3.1)."""

    def __init__(self, channels: int, growth_channels: int) -> None:
        super().__init__()
        widths = [channels + i * growth_channels for i in range(5)]
        self.convs = nn.ModuleList(
            nn.Conv2d(width, channels if i == 4 else growth_channels, 3, padding=1) for i, width in enumerate(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        dense = x
        for conv in self.convs[:-1]:
            dense = torch.cat([dense, F.leaky_relu(conv(dense), 0.2)], dim=1)
        return x + RESIDUAL_SCALE * self.convs[-1](dense)


class RRDB(nn.Module):
    """Three residual dense blocks in a residual of their own (Wang et al. 2018, ESRGAN, fig. 4)."""

    def __init__(self, channels: int, growth_channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualDenseBlock(channels, growth_channels) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.blocks(x)


class FusionLayer(nn.Module):
    """The correction that one level of encoder features adds to the decoder features of the same level."""

    def __init__(self, channels: int, num_rrdb: int, growth_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        norm = {"temb_channels": None, "groups": norm_num_groups, "eps": 1e-6}
        self.merge = ResnetBlock2D(in_channels=2 * channels, out_channels=channels, **norm)
        self.rrdbs = nn.Sequential(*(RRDB(channels, growth_channels) for _ in range(num_rrdb)))
        self.refine = ResnetBlock2D(in_channels=channels, out_channels=channels, **norm)

    def forward(self, encoder_features: Tensor, decoder_features: Tensor) -> Tensor:
        """Correction (b, C, h, w) of two features (b, C, h, w)."""
        h = torch.cat([encoder_features, decoder_features], dim=1)
        # the many narrow convolutions take half the time in this layout (bfloat16 on CPU)
        h = self.merge(h.contiguous(memory_format=torch.channels_last), None)
        return self.refine(self.rrdbs(h), None)


class ControllableFeatureWrapping(ModelMixin, ConfigMixin):
    """Fusion layers beside a stock AutoencoderKL: decoder features + w * correction.

    Args:
        channels: width of each fused level.
        levels: the autoencoder's levels that are fused; level i works at 1 / 2**i of the picture's size.
        num_rrdb: RRDBs per fusion layer.
        growth_channels: growth of the dense blocks.
        norm_num_groups: groups of the fusion layers' group norms.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _repeated_blocks = ["RRDB"]

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (256, 512),
        levels: tuple[int, ...] = (1, 2),
        num_rrdb: int = 2,
        growth_channels: int = 32,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(channels) != len(levels):
            raise ValueError(f"channels names {len(channels)} levels, levels {len(levels)}; give one width per level")
        self.fusion_layers = nn.ModuleDict(
            {
                str(level): FusionLayer(width, num_rrdb, growth_channels, norm_num_groups)
                for level, width in zip(levels, channels, strict=True)
            }
        )
        self.gradient_checkpointing = False

    @classmethod
    def from_vae(
        cls,
        vae: AutoencoderKL,
        levels: tuple[int, ...] = (1, 2),
        num_rrdb: int = 2,
        growth_channels: int = 32,
    ) -> Self:
        """Untrained fusion layers for this autoencoder."""
        widths = vae.config.block_out_channels
        return cls(
            channels=tuple(widths[level] for level in levels),
            levels=levels,
            num_rrdb=num_rrdb,
            growth_channels=growth_channels,
            norm_num_groups=vae.config.norm_num_groups,
        )

    def forward(self, level: int, encoder_features: Tensor, decoder_features: Tensor, w: float) -> Tensor:
        """Wrapped decoder features (b, C, h, w) of one fused level."""
        layer = dict(zip(self.config.levels, self.fusion_layers.values(), strict=True))[level]
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            correction = self._gradient_checkpointing_func(layer, encoder_features, decoder_features)
        else:
            correction = layer(encoder_features, decoder_features)
        return decoder_features + w * correction


@apply_forward_hook
def encode_with_features(
    vae: AutoencoderKL, image: Tensor, levels: tuple[int, ...]
) -> tuple[DiagonalGaussianDistribution, dict[int, Tensor]]:
    """Posterior of the raw code, and the encoder's features at `levels`, of one pass through the stock encoder.

    image: (b, 3, H, W) in [-1, 1], H and W multiples of the autoencoder's factor. Features: level -> (b, C,
    H / 2**level, W / 2**level), taken after the level's residual blocks.
    """
    encoder = vae.encoder
    features = {}
    h = encoder.conv_in(image)
    for level, block in enumerate(encoder.down_blocks):
        for resnet in block.resnets:
            h = resnet(h, None)
        if level in levels:
            features[level] = h
        for downsampler in block.downsamplers or ():
            h = downsampler(h)
    h = encoder.mid_block(h)
    moments = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h)))
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    return DiagonalGaussianDistribution(moments), features


@apply_forward_hook
def decode_with_features(
    vae: AutoencoderKL, cfw: ControllableFeatureWrapping, z: Tensor, features: dict[int, Tensor], w: float
) -> Tensor:
    """Image (b, 3, H, W), about [-1, 1], of the raw code z (b, C, h, w), with the LQ picture's features wrapped in.

    w: 0 is the plain decode (realism), 1 what the fusion layers were trained for (fidelity); above 1 extrapolates.
    """
    decoder = vae.decoder
    h = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    h = decoder.mid_block(decoder.conv_in(h))
    for level, block in zip(reversed(range(len(decoder.up_blocks))), decoder.up_blocks, strict=True):
        for resnet in block.resnets:
            h = resnet(h, temb=None)
        if level in cfw.config.levels:
            h = cfw(level, features[level].to(cfw.dtype), h.to(cfw.dtype), w).to(h.dtype)
        for upsampler in block.upsamplers or ():
            h = upsampler(h)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
