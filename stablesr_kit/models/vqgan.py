"""The VQ autoencoder of CodeFormer (Zhou et al. 2022, sec. 3.1): encoder, codebook, decoder (Esser et al. 2021)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from stablesr_kit.errors import ImageError

Quantization = Literal["nearest", "gumbel"]
Tap = Callable[[Tensor], Tensor]
"""What is done with the features of a level on their way: they are kept, or replaced."""


class Quantized(NamedTuple):
    """A latent in codes.

    features: (B, C, h, w), the codes; the gradient of the latent passes through them.
    indices: (B, h, w), rows of the codebook.
    loss: what draws latent and codebook together, a scalar.
    perplexity: exp of the entropy of the codes' frequencies in the batch: how many are in use.
    mean_distance: mean squared distance between latents and all codes; None where it is not defined (Gumbel).
    """

    features: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    mean_distance: Tensor | None


class VQGANOutput(NamedTuple):
    """image: the reconstruction (B, 3, H, W), about [-1, 1]."""

    image: Tensor
    quantized: Quantized


class VQGAN(ModelMixin, ConfigMixin):
    """Autoencoder whose latent is made of rows of a codebook.

    Args:
        image_size: side of the pictures it is trained on, in pixels; decides where attention is.
        base_channels: width of the first and last convolutions.
        channel_multipliers: width of each level in units of base_channels; level i works at image_size / 2**i.
        layers_per_block: residual blocks per level.
        attention_resolutions: sizes of the levels whose residual blocks are followed by attention.
        codebook_size: number of codes.
        code_channels: width of the latent and of a code.
        quantization: "nearest" takes the nearest code (van den Oord et al. 2017), "gumbel" draws it (Jang et al. 2017).
        beta: weight of the codebook's term in the loss of "nearest".
        kl_weight: weight of the divergence from the uniform choice, the loss of "gumbel".
        straight_through: whether "gumbel" draws one code in training too, instead of a mixture.
        norm_num_groups: groups of every group norm; every width must be a multiple of it.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "quantizer"]
    _repeated_blocks = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        base_channels: int = 64,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4, 8),
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        codebook_size: int = 1024,
        code_channels: int = 256,
        quantization: Quantization = "nearest",
        beta: float = 0.25,
        kl_weight: float = 1e-8,
        straight_through: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channel_multipliers) - 1)
        if image_size % factor:
            raise ValueError(
                f"image_size={image_size} cannot be halved {len(channel_multipliers) - 1} times; "
                f"give a multiple of {factor}"
            )
        if quantization not in ("nearest", "gumbel"):
            raise ValueError(f"quantization={quantization!r} is unknown; use 'nearest' or 'gumbel'")
        self.factor = factor
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        has_attention = [image_size // 2**level in attention_resolutions for level in range(len(widths))]
        self.encoder = Encoder(base_channels, widths, has_attention, layers_per_block, code_channels, norm_num_groups)
        self.quantizer: Quantizer = (
            NearestQuantizer(codebook_size, code_channels, beta)
            if quantization == "nearest"
            else GumbelQuantizer(codebook_size, code_channels, kl_weight, straight_through)
        )
        self.decoder = Decoder(widths, has_attention, layers_per_block, code_channels, norm_num_groups)

    def encode(self, image: Tensor) -> Quantized:
        """Codes of image (B, 3, H, W) in [-1, 1]; H and W multiples of `factor`.

        Raises:
            ImageError: a picture of another size or channels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or any(side % self.factor or not side for side in image.shape[2:]):
            raise ImageError(
                f"an image of shape {tuple(image.shape)} is given, expected (B, 3, H, W) "
                f"with sides that are multiples of {self.factor}"
            )
        return self.quantizer(self.encoder(image)[0])

    def decode(self, features: Tensor) -> Tensor:
        """Image (B, 3, H, W), about [-1, 1], of codes (B, C, h, w), which `quantizer.lookup` makes of indices."""
        return self.decoder(features)

    def forward(self, image: Tensor) -> VQGANOutput:
        """Reconstruction of image (B, 3, H, W) in [-1, 1]."""
        quantized = self.encode(image)
        return VQGANOutput(self.decode(quantized.features), quantized)


class Quantizer(nn.Module, ABC):
    """A codebook, and the way from a latent to its codes."""

    def __init__(self, codebook_size: int, code_channels: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, code_channels)

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Codes of the latent z (B, C, h, w)."""

    @abstractmethod
    def nearest(self, z: Tensor) -> Tensor:
        """Indices (B, h, w) of the codes that fit z (B, C, h, w) best."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, C, h, w) of indices (B, h, w)."""
        return self.codebook(indices).permute(0, 3, 1, 2).contiguous()

    def codes(self, device: torch.device) -> Tensor:
        """All codes (codes, C), from the codebook itself: an offloaded one has them only when it is called."""
        codes: Tensor = self.codebook(torch.arange(self.codebook.num_embeddings, device=device))
        return codes


class NearestQuantizer(Quantizer):
    """Replaces every position of a latent by the nearest code.

    The loss is mean((z - sg(code))^2) + beta * mean((code - sg(z))^2), sg stopping the gradient: van den Oord et al.
    2017, eq. 3, with beta at the other term, as in the training that made the published weights.
    """

    def __init__(self, codebook_size: int, code_channels: int, beta: float) -> None:
        super().__init__(codebook_size, code_channels)
        self.beta = beta
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        distances = self.distances(z)
        indices = distances.argmin(dim=-1)
        codes = self.lookup(indices)
        loss = F.mse_loss(z, codes.detach()) + self.beta * F.mse_loss(codes, z.detach())
        features = z + (codes - z).detach()
        return Quantized(features, indices, loss, perplexity(indices, self.codebook.num_embeddings), distances.mean())

    def nearest(self, z: Tensor) -> Tensor:
        return self.distances(z).argmin(dim=-1)

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances (B, h, w, codes), in float32: half precision confuses neighbouring codes."""
        with torch.autocast(z.device.type, enabled=False):
            positions = z.float().permute(0, 2, 3, 1)
            codes = self.codes(z.device).float()
            flat = positions.flatten(0, 2)
            lengths = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
            return torch.addmm(lengths, flat, codes.t(), alpha=-2).view(*positions.shape[:3], -1)


class GumbelQuantizer(Quantizer):
    """Draws every position's code from a learned distribution, with a gradient through the draw.

    The draw, by torch's global generator, happens in eval mode too. In training the features are mixtures of codes
    unless `straight_through`. The loss is kl_weight times the divergence of the distributions from the uniform one.
    Training lowers `temperature`, the softness of the draw, by assigning to it.
    """

    def __init__(self, codebook_size: int, code_channels: int, kl_weight: float, straight_through: bool) -> None:
        super().__init__(codebook_size, code_channels)
        self.kl_weight = kl_weight
        self.straight_through = straight_through
        self.temperature = 1.0
        self.projection = nn.Conv2d(code_channels, codebook_size, 1)

    def forward(self, z: Tensor) -> Quantized:
        logits = self.projection(z).float()
        is_hard = self.straight_through or not self.training
        choice = F.gumbel_softmax(logits, self.temperature, hard=is_hard, dim=1)
        features = torch.einsum("bkhw,kc->bchw", choice.to(z.dtype), self.codes(z.device))
        p = logits.softmax(dim=1)
        size = logits.shape[1]
        loss = self.kl_weight * (p * torch.log(p * size + 1e-10)).sum(dim=1).mean()
        indices = choice.argmax(dim=1)
        return Quantized(features, indices, loss, perplexity(indices, size), None)

    def nearest(self, z: Tensor) -> Tensor:
        return self.projection(z).argmax(dim=1)


def perplexity(indices: Tensor, codebook_size: int) -> Tensor:
    """exp of the entropy of the codes' frequencies: from 1, a single code, to codebook_size, all equally often."""
    counts = torch.bincount(indices.flatten(), minlength=codebook_size)
    p = counts / counts.sum()
    return torch.exp(-(p * torch.log(p + 1e-10)).sum())


class Encoder(nn.Module):
    """Picture to latent; its features can be tapped at every level."""

    def __init__(
        self,
        base_channels: int,
        widths: list[int],
        has_attention: list[bool],
        layers_per_block: int,
        code_channels: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(before, width, layers_per_block, with_attention, layers_per_block - 1, groups)
            for before, width, with_attention in zip([base_channels, *widths], widths, has_attention, strict=False)
        )
        self.downsamplers = nn.ModuleList(
            Downsample2D(width, use_conv=True, padding=0, name="op") for width in widths[:-1]
        )
        self.middle = Middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], code_channels, 3, padding=1)

    def forward(self, image: Tensor, tapped_levels: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Latent (B, C, h, w) of image (B, 3, H, W), and the features (B, c, H / 2**i, W / 2**i) of tapped levels i."""
        taps: dict[int, Tensor] = {}
        h = self.conv_in(image)
        for i, level in enumerate(self.levels):
            h = level(h, partial(keep, taps, i) if i in tapped_levels else None)
            if i < len(self.downsamplers):
                h = self.downsamplers[i](h)
        return self.conv_out(self.norm_out(self.middle(h))), taps


class Decoder(nn.Module):
    """Codes to picture; its features can be changed at every level. `levels` go from the smallest to the largest."""

    def __init__(
        self, widths: list[int], has_attention: list[bool], layers_per_block: int, code_channels: int, groups: int
    ) -> None:
        super().__init__()
        rising = widths[::-1]
        self.conv_in = nn.Conv2d(code_channels, rising[0], 3, padding=1)
        self.middle = Middle(rising[0], groups)
        self.levels = nn.ModuleList(
            # the published model taps the smallest level after its last block, the others after their first
            Level(before, width, layers_per_block, with_attention, 0 if i else layers_per_block - 1, groups)
            for i, (before, width, with_attention) in enumerate(
                zip([rising[0], *rising], rising, reversed(has_attention), strict=False)
            )
        )
        self.upsamplers = nn.ModuleList(Upsample2D(width, use_conv=True) for width in rising[:-1])
        self.norm_out = group_norm(rising[-1], groups)
        self.conv_out = nn.Conv2d(rising[-1], 3, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; its norms are never stored in less."""
        return self.norm_out.weight.dtype

    def forward(self, features: Tensor, taps: Mapping[int, Tap] | None = None) -> Tensor:
        """Image (B, 3, H, W) of codes (B, C, h, w); `taps` change the features of level i of the picture's sizes."""
        taps = taps or {}
        h = self.middle(self.conv_in(features))
        for i, level in enumerate(self.levels):
            h = level(h, taps.get(len(self.levels) - 1 - i))
            if i < len(self.upsamplers):
                h = self.upsamplers[i](h)
        return self.conv_out(self.norm_out(h))


def keep(taps: dict[int, Tensor], level: int, h: Tensor) -> Tensor:
    """A tap that changes nothing and puts the features into `taps`."""
    taps[level] = h
    return h


class Level(nn.Module):
    """The residual blocks of one size, each followed by attention if the level has it."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, with_attention: bool, tapped: int, groups: int
    ) -> None:
        super().__init__()
        self.tapped = tapped
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if i else in_channels, channels, groups) for i in range(num_layers)
        )
        self.attentions = nn.ModuleList(
            SelfAttention(channels, groups) for _ in range(num_layers if with_attention else 0)
        )
        self._gradient_checkpointing_func: Any = None
        self.gradient_checkpointing = False

    def forward(self, h: Tensor, tap: Tap | None = None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(resnet, h)
            else:
                h = resnet(h)
            if tap is not None and i == self.tapped:
                h = tap(h)
            if self.attentions:
                h = self.attentions[i](h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attention = SelfAttention(channels, groups)

    def forward(self, h: Tensor) -> Tensor:
        before, after = self.resnets
        return after(self.attention(before(h)))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input, through a 1x1 convolution where the widths differ.

    The arithmetic of diffusers' ResnetBlock2D, with fewer passes over memory, which is half of the cost on a CPU.
    """

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels, groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, channels, h, w) of x (B, in_channels, h, w)."""
        in_place = not torch.is_grad_enabled()
        h = self.conv1(F.silu(self.norm1(x), inplace=in_place))
        h = self.conv2(F.silu(self.norm2(h), inplace=in_place))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """One head over all positions of a normalised feature map, added to it.

    It keeps the layout of its input: diffusers' Attention returns channels last, in which the group norms after it
    round thirty times as much on a CPU.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) and what its positions tell each other."""
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(positions)[:, None].chunk(3, dim=-1)
        gathered = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out(gathered).transpose(1, 2).unflatten(2, x.shape[2:])


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The norm of every block."""
    return nn.GroupNorm(groups, channels, eps=1e-6)
