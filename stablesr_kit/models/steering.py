"""How a stock Stable Diffusion UNet takes SFT maps, and one steered prediction with guidance.

The UNet stays the object it was: its type, keys, config and hooks. Two kinds of its modules get a class that does what
the stock one does, to the bit, unless maps come with the call: the maps travel as `timestep_cond`, leave the time
embedding together with the embedding, and so reach every residual block as an argument. Nothing is stored anywhere, so
that pipelines and threads may share the UNet, and gradient checkpointing, compilation, FreeU and ControlNet residuals
see a tuple in the place of a tensor.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.execution import change_class

Modulation = Literal["spade", "sft"]


class SFTMaps(NamedTuple):
    """What the adapter tells the UNet at one timestep; given to a steerable UNet as `timestep_cond`.

    maps: residual block name -> (gamma, beta), each (b, C, h, w) at that block's output size. The UNet's batch may be a
        whole multiple of b, ordered branch by branch (classifier-free guidance): every branch sees the same maps.
    modulation: "sft" applies h * (1 + gamma) + beta (Wang et al. 2018, SFT-GAN); "spade" normalises h by groups first
        (Park et al. 2019, eq. 1 with group norm, as StableSR, Wang et al. 2023, eq. 4).
    timestep_cond: the condition (B, channels) that the UNet itself adds to its timestep, if it is one of those that do
        (latent consistency models).
    """

    modulation: Modulation
    maps: dict[str, tuple[Tensor, Tensor]]
    timestep_cond: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> "SFTMaps":
        """The same on another device or in another precision; arguments as `Tensor.to`."""
        cond = self.timestep_cond
        return SFTMaps(
            self.modulation,
            {k: (gamma.to(*args, **kwargs), beta.to(*args, **kwargs)) for k, (gamma, beta) in self.maps.items()},
            None if cond is None else cond.to(*args, **kwargs),
        )


class SFTTimestepEmbedding(TimestepEmbedding):
    """The stock embedding, which hands on the maps that come with its condition."""

    def forward(self, sample: Tensor, condition: Tensor | SFTMaps | None = None) -> Any:
        """Embedding (B, channels); with maps (embedding, maps)."""
        if not isinstance(condition, SFTMaps):
            return super().forward(sample, condition)
        return super().forward(sample, condition.timestep_cond), condition


class SFTResnetBlock2D(ResnetBlock2D):
    """The stock residual block, with spatial feature transform between its second convolution and the skip addition."""

    sft_name: str

    def forward(self, input_tensor: Tensor, temb: Tensor | tuple[Tensor, SFTMaps], *args: Any, **kwargs: Any) -> Tensor:
        """Output (B, C, h, w); `temb` is the time embedding, or (time embedding, SFT maps)."""
        if not isinstance(temb, tuple):
            return super().forward(input_tensor, temb, *args, **kwargs)
        emb, sft = temb
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        h = h + self.time_emb_proj(self.nonlinearity(emb))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        gamma, beta = sft.maps[self.sft_name]
        if sft.modulation == "spade":
            h = F.group_norm(h, self.norm2.num_groups, eps=self.norm2.eps)
        branches = h.unflatten(0, (-1, gamma.shape[0]))  # of guidance, which share one set of maps
        if torch.is_grad_enabled() or h.dtype != gamma.dtype:
            h = (branches * (1 + gamma) + beta).flatten(0, 1)
        else:  # the same bits without new tensors; h is nobody else's
            branches.mul_(1 + gamma).add_(beta)
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        if (
            torch.is_grad_enabled()
            or self.output_scale_factor != 1
            or (h.dtype, h.stride()) != (skip.dtype, skip.stride())
        ):
            return (skip + h) / self.output_scale_factor
        return h.add_(skip)


# accelerate finds the modules that one device must hold by the names of their classes
SFTResnetBlock2D.__name__ = ResnetBlock2D.__name__


def make_steerable(unet: UNet2DConditionModel) -> None:
    """Let a UNet take SFT maps as its `timestep_cond`. Without them it gives what it gave before, to the bit.

    It may be compiled, offloaded, quantised or shared, before or after. A UNet that is steerable already stays as it
    is.

    Raises:
        ConfigError: it has conditions or residual blocks that SFT is not defined for (class labels, SDXL's sizes,
            scale-shift norm, resampling blocks), or a forward of unknown origin in their place.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the module
    if isinstance(getattr(unet, "time_embedding", None), SFTTimestepEmbedding):
        return
    if not isinstance(unet, UNet2DConditionModel):
        raise ConfigError(
            f"a {type(unet).__name__} is given as unet, expected a UNet2DConditionModel; "
            "use one of the Stable Diffusion 1.x/2.x family"
        )
    for field in ("time_embedding_act_fn", "class_embed_type", "num_class_embeds", "addition_embed_type"):
        if unet.config[field] is not None:
            raise ConfigError(
                f"a UNet with {field}={unet.config[field]!r} is given, expected None; "
                "use one of the Stable Diffusion 1.x/2.x family"
            )
    blocks = {name: block for name, block in unet.named_modules() if isinstance(block, ResnetBlock2D)}
    for name, block in blocks.items():
        if block.time_embedding_norm != "default" or block.up or block.down or block.skip_time_act:
            raise ConfigError(
                f"residual block {name} resamples or uses time_embedding_norm={block.time_embedding_norm!r}; "
                "expected the plain blocks of the Stable Diffusion 1.x/2.x family"
            )
    for name, block in blocks.items():
        block.sft_name = name.replace("_orig_mod.", "")
        change_class(block, SFTResnetBlock2D, name)
    change_class(unet.time_embedding, SFTTimestepEmbedding, "time_embedding")


def steered_prediction(
    unet: UNet2DConditionModel,
    adapter: ModelMixin,
    latents: Tensor,
    timestep: Tensor | float,
    lq_latents: Tensor,
    prompt_embeds: Tensor,
    guidance_scale: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    """What the steered UNet predicts at one timestep, after guidance; epsilon or v as it was trained.

    Args:
        unet: it is made steerable.
        adapter: a `StableSRAdapter` for it.
        latents, lq_latents: (B, C, h, w).
        prompt_embeds: (B, tokens, channels), or (1, ...) for all, or (2B, ...) with the negative ones first, which
            turns classifier-free guidance on (Ho and Salimans 2022). The adapter runs once for both.
        guidance_scale: weight of that guidance, 1 is none; a UNet distilled with guidance (Meng et al. 2023) is told
            it.
        kwargs: of the UNet's forward, such as cross_attention_kwargs.
    """
    make_steerable(unet)
    sft = adapter(lq_latents.to(adapter.dtype), timestep).to(unet.dtype)
    branches = max(len(prompt_embeds) // len(latents), 1)
    batch = branches * len(latents)
    if unet.config.time_cond_proj_dim is not None:
        scale = torch.full((batch,), 1000.0 * (guidance_scale - 1), device=latents.device)
        embedding = get_timestep_embedding(scale, unet.config.time_cond_proj_dim, downscale_freq_shift=1)
        sft = sft._replace(timestep_cond=embedding.to(unet.dtype))
    prediction: Tensor = unet(
        torch.cat([latents] * branches),
        timestep,
        encoder_hidden_states=prompt_embeds.expand(batch, -1, -1),
        timestep_cond=sft,
        return_dict=False,
        **kwargs,
    )[0]
    if branches == 1:
        return prediction
    uncond, cond = prediction.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def residual_blocks(unet: UNet2DConditionModel) -> list[tuple[str, int, int]]:
    """(name, output channels, level) of every residual block; level i works at 1 / 2**i of the latent's size."""
    last = len(unet.config.block_out_channels) - 1
    parts = [(f"down_blocks.{i}", block, i) for i, block in enumerate(unet.down_blocks)]
    parts += [("mid_block", unet.mid_block, last)] if unet.mid_block is not None else []  # distilled ones lack it
    parts += [(f"up_blocks.{i}", block, last - i) for i, block in enumerate(unet.up_blocks)]
    return [
        (f"{part}.resnets.{j}", resnet.out_channels, level)
        for part, block, level in parts
        for j, resnet in enumerate(block.resnets)
    ]
