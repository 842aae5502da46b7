"""The adapter: time-aware encoder and SFT layers, all that is trained beside the frozen UNet (Wang et al. 2023)."""

from itertools import zip_longest
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.steering import Modulation, SFTMaps, residual_blocks


class SFTLayer(nn.Module):
    """(gamma, beta) of one residual block from the features of its level: two 3x3 convolutions with a ReLU between."""

    def __init__(self, cond_channels: int, hidden_channels: int, channels: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(cond_channels, hidden_channels, 3, padding=1)
        self.gamma_beta = nn.Conv2d(hidden_channels, 2 * channels, 3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, beta), each (b, channels, h, w), of features (b, cond_channels, h, w)."""
        gamma, beta = self.gamma_beta(F.relu(self.shared(features))).chunk(2, dim=1)
        if self.gamma_beta.weight.is_contiguous():  # the UNet's layout then too: mixed ones are slow to multiply
            return gamma.contiguous(), beta.contiguous()
        return gamma, beta


class StableSRAdapter(ModelMixin, ConfigMixin):
    """Time-aware encoder of the LQ latent, and one SFT layer per residual block of the UNet it steers.

    Args:
        sft_blocks: (name, channels, level) of every residual block of the UNet, see `residual_blocks`.
        in_channels: channels of the latent.
        block_out_channels: widths of the encoder, one per level; as many levels as the UNet has.
        down_block_types: "AttnDownBlock2D" or "DownBlock2D" per level; the middle has attention if any level has.
        layers_per_block: residual blocks per level.
        num_attention_heads: heads of every attention layer of the encoder.
        norm_num_groups: groups of the encoder's group norms.
        cond_channels: width of the features every level hands to its SFT layers.
        hidden_channels: width inside an SFT layer.
        modulation: "spade" (released checkpoints) or "sft" (zero-initialised: an untrained adapter leaves the UNet's
            output bitwise unchanged).
        cross_attention_dim: width of the UNet's text condition.
        prompt_length: tokens of the empty prompt, which the adapter is trained with and therefore carries along as
            `empty_prompt_embeds` (1, prompt_length, cross_attention_dim); 0 carries none.
    """

    empty_prompt_embeds: Tensor | None

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "time_embedding"]
    _repeated_blocks = ["SFTLayer"]

    @register_to_config
    def __init__(
        self,
        sft_blocks: list[tuple[str, int, int]],
        in_channels: int = 4,
        block_out_channels: tuple[int, ...] = (256, 256, 512, 512),
        down_block_types: tuple[str, ...] = (
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "DownBlock2D",
        ),
        layers_per_block: int = 2,
        num_attention_heads: int = 4,
        norm_num_groups: int = 32,
        cond_channels: int = 256,
        hidden_channels: int = 128,
        modulation: Modulation = "spade",
        cross_attention_dim: int = 1024,
        prompt_length: int = 77,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        if len(down_block_types) != levels:
            raise ValueError(f"down_block_types names {len(down_block_types)} levels, block_out_channels {levels}")
        deepest = max(level for _, _, level in sft_blocks) + 1
        if deepest != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels, the UNet has {deepest}; give one width per level"
            )
        if modulation not in ("spade", "sft"):
            raise ValueError(f"modulation={modulation!r} is unknown; use 'spade' or 'sft'")

        width = block_out_channels[0]
        emb_channels = 4 * width
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, emb_channels)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                block_type,
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=channels,
                temb_channels=emb_channels,
                add_downsample=i < levels - 1,
                resnet_eps=1e-5,
                resnet_act_fn="silu",
                resnet_groups=norm_num_groups,
                attention_head_dim=channels // num_attention_heads,
                downsample_padding=1,
            )
            for i, (block_type, channels) in enumerate(zip(down_block_types, block_out_channels, strict=True))
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=block_out_channels[-1],
            temb_channels=emb_channels,
            resnet_eps=1e-5,
            resnet_act_fn="silu",
            resnet_groups=norm_num_groups,
            attention_head_dim=block_out_channels[-1] // num_attention_heads,
            add_attention="AttnDownBlock2D" in down_block_types,
        )
        self.feature_blocks = nn.ModuleList(
            ResnetBlock2D(
                in_channels=channels,
                out_channels=cond_channels,
                temb_channels=emb_channels,
                groups=norm_num_groups,
                eps=1e-5,
            )
            for channels in block_out_channels
        )
        sft_layers = [SFTLayer(cond_channels, hidden_channels, channels) for _, channels, _ in sft_blocks]
        self.sft_layers = nn.ModuleList(sft_layers)
        empty_prompt_embeds = torch.zeros(1, prompt_length, cross_attention_dim) if prompt_length else None
        self.register_buffer("empty_prompt_embeds", empty_prompt_embeds)
        if modulation == "sft":
            for layer in sft_layers:
                for parameter in layer.gamma_beta.parameters():
                    nn.init.zeros_(parameter)
        self.gradient_checkpointing = False

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, **config: Any) -> Self:
        """An untrained adapter for this UNet; `config` as the constructor, without what the UNet decides."""
        return cls(
            sft_blocks=residual_blocks(unet),
            in_channels=unet.config.in_channels,
            cross_attention_dim=unet.config.cross_attention_dim,
            **config,
        )

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in any model; the empty prompt's embedding, which is read outside of a forward, stays in memory."""
        embeds = None if self.empty_prompt_embeds is None else self.empty_prompt_embeds.clone()
        super().enable_group_offload(*args, **kwargs)
        self.empty_prompt_embeds = embeds

    def encode(self, lq_latents: Tensor, timestep: Tensor | float) -> list[Tensor]:
        """Features (b, cond_channels, h / 2**i, w / 2**i) of each level i.

        lq_latents: (b, in_channels, h, w); timestep: the original one, 0..999, a number or (b,).
        """
        timestep = torch.as_tensor(timestep, device=lq_latents.device).expand(lq_latents.shape[0])
        emb = self.time_embedding(self.time_proj(timestep).to(lq_latents.dtype))
        # narrow convolutions take two thirds of the time in this layout (bfloat16 on CPU)
        h = self.conv_in(lq_latents.contiguous(memory_format=torch.channels_last))
        taps = []
        for block in self.down_blocks:
            h, outputs = block(h, emb)
            taps.append(outputs[self.config.layers_per_block - 1])  # before the downsampling convolution
        taps[-1] = self.mid_block(h, emb)
        return [block(tap, emb) for block, tap in zip(self.feature_blocks, taps, strict=True)]

    def modulate(self, features: list[Tensor]) -> SFTMaps:
        """SFT maps of every residual block, from the features of each level."""
        maps = {}
        for (name, _, level), layer in zip(self.config.sft_blocks, self.sft_layers, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                maps[name] = self._gradient_checkpointing_func(layer, features[level])
            else:
                maps[name] = layer(features[level])
        return SFTMaps(self.config.modulation, maps)

    def forward(self, lq_latents: Tensor, timestep: Tensor | float) -> SFTMaps:
        """SFT maps of every residual block at one timestep; arguments as `encode`."""
        return self.modulate(self.encode(lq_latents, timestep))


def check_adapter(adapter: StableSRAdapter, unet: UNet2DConditionModel) -> None:
    """Raises ConfigError if the adapter was made for another UNet."""
    made_for = [(name, channels, level) for name, channels, level in adapter.config.sft_blocks]
    blocks = residual_blocks(unet)
    if made_for != blocks:
        theirs, ours = next((one, other) for one, other in zip_longest(made_for, blocks) if one != other)
        raise ConfigError(
            f"an adapter of another UNet is given: it steers {len(made_for)} residual blocks, this UNet has "
            f"{len(blocks)}, and they first differ at {theirs} and {ours} (name, channels, level); "
            "give the adapter that was trained with this UNet"
        )
    if adapter.config.prompt_length and adapter.config.cross_attention_dim != unet.config.cross_attention_dim:
        raise ConfigError(
            f"an adapter of another UNet is given: its text condition is {adapter.config.cross_attention_dim} wide, "
            f"this UNet's {unet.config.cross_attention_dim}; give the adapter that was trained with this UNet"
        )
