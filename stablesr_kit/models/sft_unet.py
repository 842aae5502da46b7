"""A Stable Diffusion UNet whose residual blocks accept SFT maps. It adds no parameter, no key, no config field."""

import copy
import functools
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import (
    ModelMixin as ModelMixin,
)  # the loader looks this name up beside the class
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

Modulation = Literal["spade", "sft"]


class SFTMaps(NamedTuple):
    """What the adapter tells the UNet at one timestep.

    maps: residual block name -> (gamma, beta), each (b, C, h, w) at that block's output size. The UNet's batch may be a
        whole multiple of b, ordered branch by branch (classifier-free guidance): every branch sees the same maps.
    modulation: "sft" applies h * (1 + gamma) + beta (Wang et al. 2018, SFT-GAN); "spade" normalises h by groups first
        (Park et al. 2019, eq. 1 with group norm, as StableSR, Wang et al. 2023, eq. 4).
    """

    modulation: Modulation
    maps: dict[str, tuple[Tensor, Tensor]]

    def to(self, dtype: torch.dtype) -> "SFTMaps":
        """The same maps in another precision."""
        return SFTMaps(
            self.modulation, {k: (gamma.to(dtype), beta.to(dtype)) for k, (gamma, beta) in self.maps.items()}
        )


class SFTResnetBlock2D(ResnetBlock2D):
    """Stock residual block, with spatial feature transform between its second convolution and the skip addition."""

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
        if h.shape[0] == gamma.shape[0]:
            h = h * (1 + gamma) + beta
        else:  # guidance branches share one set of maps
            h = (h.unflatten(0, (-1, gamma.shape[0])) * (1 + gamma) + beta).flatten(0, 1)
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (skip + h) / self.output_scale_factor


class _SFTCarrier(nn.Module):
    """Hands the maps to the residual blocks together with the time embedding, as an explicit argument.

    It sits where UNet2DConditionModel ends its time embedding, so gradient checkpointing, FreeU, ControlNet residuals
    and compilation see nothing but a tuple in the place of a tensor.
    """

    sft: SFTMaps | None = None

    def forward(self, emb: Tensor) -> Tensor | tuple[Tensor, SFTMaps]:
        return emb if self.sft is None else (emb, self.sft)


class SFTUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel with one more argument, `sft`. Keys and config are those of the stock class."""

    time_embed_act: Any  # the carrier, once this class has it

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]  # ConfigMixin reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        UNet2DConditionModel.__init__(self, *args, **kwargs)
        self._accept_sft()

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel) -> Self:
        """The same UNet, sharing parameters and modules with `unet`, able to take SFT maps; itself if it is already.

        Raises:
            ValueError: the UNet is compiled or has hooks, or residual blocks that SFT is not defined for (scale-shift
                norm, resampling blocks).
        """
        bare = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the module
        if isinstance(bare, cls):
            return unet
        if bare is not unet or "forward" in vars(unet):
            raise ValueError(
                "the UNet is compiled or has hooks (offloading, casting) on its forward; "
                "give the plain UNet, and compile or offload it after"
            )
        sft_unet = copy.copy(unet)
        sft_unet._modules = dict(unet._modules)
        sft_unet.__class__ = cls
        sft_unet._accept_sft()
        return sft_unet

    def _accept_sft(self) -> None:
        if isinstance(self.time_embed_act, _SFTCarrier):
            return
        if self.time_embed_act is not None:
            raise ValueError(
                f"time_embedding_act_fn={self.config.time_embedding_act_fn!r} is given, expected None; "
                "use a UNet of the Stable Diffusion 1.x/2.x family"
            )
        self.time_embed_act = _SFTCarrier()
        for name, block in self.named_modules():
            if isinstance(block, ResnetBlock2D):
                if block.time_embedding_norm != "default" or block.up or block.down or block.skip_time_act:
                    raise ValueError(
                        f"residual block {name} resamples or uses time_embedding_norm={block.time_embedding_norm!r}; "
                        "expected the plain blocks of the Stable Diffusion 1.x/2.x family"
                    )
                block.__class__ = SFTResnetBlock2D
                block.sft_name = name

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        sft: SFTMaps | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock forward; `sft` None runs the untouched prior.

        sample: (B, C, h, w) noised latent; sft: maps of batch b with B a multiple of b.
        """
        self.time_embed_act.sft = sft
        try:
            return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)
        finally:
            self.time_embed_act.sft = None


# diffusers decides by the class's name: block weights of LoRA, `_class_name` in the config that stock classes read.
SFTUNet2DConditionModel.__name__ = UNet2DConditionModel.__name__


def residual_blocks(unet: UNet2DConditionModel) -> list[tuple[str, int, int]]:
    """(name, output channels, level) of every residual block; level i works at 1 / 2**i of the latent's size."""
    last = len(unet.config.block_out_channels) - 1
    parts = [(f"down_blocks.{i}", block, i) for i, block in enumerate(unet.down_blocks)]
    parts += [("mid_block", unet.mid_block, last)]
    parts += [(f"up_blocks.{i}", block, last - i) for i, block in enumerate(unet.up_blocks)]
    return [
        (f"{part}.resnets.{j}", resnet.out_channels, level)
        for part, block, level in parts
        for j, resnet in enumerate(block.resnets)
    ]
