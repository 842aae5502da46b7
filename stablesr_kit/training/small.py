"""Small networks that train in minutes: their initialisation, and reuse of trained layers.

Autoencoder: with three channels per group, group normalisation erases brightness and colour. One
group per layer, residual branches that start at zero, nearly linear outputs and a constant pilot signal that dominates
the statistics of the output norms avoid that.

VQGAN: its outer levels are copied from a trained autoencoder. Two things differ. The
activation before the autoencoder's last convolution is replaced by the nearest linear map. Of its decoder's outer
levels, all but the innermost lose their second residual block.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.models.vqgan import VQGAN, Quantized

PILOT = 3.0
"""Constant that is added to half of the channels and subtracted from the others, before an output norm."""


def build_small_autoencoder(
    block_out_channels: tuple[int, ...], latent_channels: int, layers_per_block: int
) -> AutoencoderKL:
    """Untrained autoencoder without mid-block attention, initialised as a nearly linear map."""
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
    with torch.no_grad():  # a narrow posterior from the start; with a wide one half of the channels collapse
        vae.quant_conv.weight[latent_channels:] *= 0.05
        vae.quant_conv.bias[latent_channels:] = -6.0
    return vae


@torch.no_grad()
def _start_output_linear(conv: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Add a pilot signal before the norm and remove it afterwards; shift SiLU into its linear part."""
    signs = torch.ones_like(_bias(conv))
    signs[1::2] = -1
    _bias(conv).copy_(PILOT * signs)
    norm.weight.fill_(math.sqrt(1 + PILOT**2))
    norm.bias.copy_(-PILOT * signs + PILOT)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change the 1x1 convolutions around the latent so that it has mean 0 and standard deviation 1 per channel.

    mean, std: (C,), of the latent before. Reconstructions stay the same, and scaling_factor is 1 afterwards. The
    posterior's log-variance is shifted by -2 log(std).
    """
    channels = mean.numel()
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]


def start_fusion_silent(cfw: ControllableFeatureWrapping) -> None:
    """Initialise fusion layers to add almost nothing, so that training starts from the plain decoder."""
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


def build_small_unet(block_out_channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Untrained UNet with one residual block per level, and attention at the lowest level only."""
    levels = len(block_out_channels)
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        down_block_types=(*("DownBlock2D",) * (levels - 1), "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
    )


def build_small_adapter(unet: UNet2DConditionModel, block_out_channels: tuple[int, ...]) -> StableSRAdapter:
    """Untrained adapter for such a UNet, without attention; it does not change the UNet's output at first."""
    return StableSRAdapter.from_unet(
        unet,
        block_out_channels=block_out_channels,
        down_block_types=("DownBlock2D",) * len(block_out_channels),
        layers_per_block=1,
        norm_num_groups=16,
        cond_channels=64,
        hidden_channels=64,
        modulation="sft",
        prompt_length=1,
    )


def build_small_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """DDIM with Stable Diffusion's noise schedule, and steps spaced evenly from the last timestep down."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


class GraftedVQGAN(nn.Module):
    """A VQGAN of one residual block per level whose outer levels are those of `vae`, frozen.

    Args:
        vqgan: untrained, its first levels as wide as those of the autoencoder. Changed in place.
        vae: the trained autoencoder.
        images: (B, 3, H, W) in [-1, 1], used to linearise its last activation.

    Raises:
        ConfigError: the widths differ, or an encoder has more than one block per level.
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
        """Features (B, c, h, w) for the outer decoder, from those of the outer encoder, quantised or not."""
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
        """Input of the inner levels for image (B, 3, H, W) in [-1, 1]."""
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
    """Target of the inner levels for image (B, 3, H, W) in [-1, 1]: the autoencoder's own features for the decoder."""
    z = vae.encode(image).latent_dist.mean
    h = vae.decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    h = vae.decoder.mid_block(h)
    for resnet in vae.decoder.up_blocks[0].resnets:
        h = resnet(h, None)
    return h


@torch.no_grad()
def start_residuals_at_zero(vqgan: VQGAN) -> None:
    """Initialise residual blocks as their shortcut, other convolutions orthogonally: narrow networks learn faster."""
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
