"""The noise that InvSR starts from, predicted from the LQ picture (Yue, Liao and Loy 2024, "Arbitrary-steps Image
Super-resolution via Diffusion Inversion")."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn


class NoisePredictor(ModelMixin, ConfigMixin):
    """A posterior of unit noise for the latent of a picture that is to become four times as large.

    Args:
        in_channels: of the picture.
        latent_channels: of the latent.
        block_out_channels: widths, one per level; each level but the last halves the picture. With two levels and an
            autoencoder of factor 8 the result has the size of the latent.
        layers_per_block: residual blocks with attention per level.
        attention_head_dim: channels of an attention head.
        norm_num_groups: groups of the group norms.
        temb_channels: width of the time embedding.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (256, 512),
        layers_per_block: int = 3,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        fourier_channels = max(128, first)
        self.time_proj = Timesteps(fourier_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(fourier_channels, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D",
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=channels,
                temb_channels=temb_channels,
                add_downsample=i < len(block_out_channels) - 1,
                resnet_eps=1e-6,
                resnet_act_fn="silu",
                resnet_groups=norm_num_groups,
                attention_head_dim=attention_head_dim,
                downsample_padding=0,  # one row and column of zeros at the end, as in the autoencoder
            )
            for i, channels in enumerate(block_out_channels)
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=last,
            temb_channels=temb_channels,
            resnet_eps=1e-6,
            resnet_act_fn="silu",
            resnet_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, eps=1e-6)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, 2 * latent_channels, 3, padding=1)

    @property
    def factor(self) -> int:
        """Pixels per position of the noise along a side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, image: Tensor, timestep: Tensor | float) -> Tensor:
        """Mean and log variance of the noise (B, 2 * latent_channels, h / 2, w / 2) with two levels.

        image: LQ (B, 3, h, w) in [-1, 1] at its own size. timestep: that the noised latent will have.
        """
        timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=image.device).expand(len(image))
        emb = self.time_embedding(self.time_proj(timesteps).to(image.dtype))
        x = self.conv_in(image)
        for block in self.down_blocks:
            x, _ = block(x, emb)
        x = self.mid_block(x, emb)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))
