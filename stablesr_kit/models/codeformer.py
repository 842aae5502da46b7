"""CodeFormer: restores a face by predicting the codes of its high-quality version (Zhou et al. 2022)."""

from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stablesr_kit.errors import ImageError
from stablesr_kit.models.vqgan import VQGAN, ResidualBlock

CodeLookup = Literal["transformer", "nearest"]


class CodeFormerOutput(NamedTuple):
    """What CodeFormer makes of a batch of faces.

    image: (B, 3, S, S), about [-1, 1]; None if only codes were asked for.
    logits: (B, h * w, codes), position by position, row after row; None for the nearest code, which has none.
    lq_feat: latent of the input, (B, C, h, w).
    indices: the codes taken, (B, h, w).
    """

    image: Tensor | None
    logits: Tensor | None
    lq_feat: Tensor
    indices: Tensor


class CodeFormer(ModelMixin, ConfigMixin):
    """A VQ autoencoder of faces, a transformer that predicts codes, and fusion (CFT) of the input's features.

    Args:
        image_size, base_channels, channel_multipliers, layers_per_block: those of `VQGAN`.
        attention_resolutions, codebook_size, code_channels, norm_num_groups: likewise.
        dim: width of the transformer.
        num_heads: its attention heads.
        num_layers: its layers.
        fuse_sizes: sizes, in pixels of the feature maps, at which the input's features may be fused into the decoder
            (the published connect_list).
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "quantizer", "positions"]
    _repeated_blocks = ["ResidualBlock", "CodeTransformerLayer"]

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
        norm_num_groups: int = 32,
        dim: int = 512,
        num_heads: int = 8,
        num_layers: int = 9,
        fuse_sizes: tuple[int, ...] = (32, 64, 128, 256),
    ) -> None:
        super().__init__()
        self.vqgan = VQGAN(
            image_size=image_size,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            layers_per_block=layers_per_block,
            attention_resolutions=attention_resolutions,
            codebook_size=codebook_size,
            code_channels=code_channels,
            norm_num_groups=norm_num_groups,
        )
        widths = {image_size // 2**i: base_channels * m for i, m in enumerate(channel_multipliers)}
        unknown = [size for size in fuse_sizes if size not in widths]
        if unknown:
            raise ValueError(f"fuse_sizes={unknown} are no sizes of the levels, expected some of {list(widths)}")
        latent_size = image_size // self.vqgan.factor
        self.positions = nn.Parameter(torch.zeros(latent_size**2, dim))
        self.proj_in = nn.Linear(code_channels, dim)
        self.layers = nn.ModuleList(CodeTransformerLayer(dim, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, codebook_size, bias=False)
        self.fusions = nn.ModuleDict(
            {str(size): ControllableFeatureTransform(widths[size], norm_num_groups) for size in fuse_sizes}
        )
        self.fused_levels = {list(widths).index(size): str(size) for size in fuse_sizes}
        self.gradient_checkpointing = False

    @classmethod
    def from_vqgan(
        cls,
        vqgan: VQGAN,
        dim: int = 512,
        num_heads: int = 8,
        num_layers: int = 9,
        fuse_sizes: Collection[int] = (32, 64, 128, 256),
    ) -> Self:
        """An untrained CodeFormer around a copy of this autoencoder.

        Raises:
            ValueError: its quantiser draws codes; CodeFormer takes the nearest ones as its targets.
        """
        config = vqgan.config
        if config.quantization != "nearest":
            raise ValueError(f"a VQGAN with {config.quantization!r} is given, expected 'nearest'")
        codeformer = cls(
            image_size=config.image_size,
            base_channels=config.base_channels,
            channel_multipliers=tuple(config.channel_multipliers),
            layers_per_block=config.layers_per_block,
            attention_resolutions=tuple(config.attention_resolutions),
            codebook_size=config.codebook_size,
            code_channels=config.code_channels,
            norm_num_groups=config.norm_num_groups,
            dim=dim,
            num_heads=num_heads,
            num_layers=num_layers,
            fuse_sizes=tuple(fuse_sizes),
        )
        codeformer.vqgan.load_state_dict(vqgan.state_dict())
        return codeformer

    def forward(
        self,
        image: Tensor,
        w: float | Tensor = 0.0,
        *,
        adain: bool = False,
        code_only: bool = False,
        detach_codes: bool = True,
        code_lookup: CodeLookup = "transformer",
    ) -> CodeFormerOutput:
        """Restored faces.

        Args:
            image: (B, 3, S, S) in [-1, 1], S the config's image_size.
            w: 0 quality (nothing is fused) to 1 fidelity, for all or one per face, (B,); above 1 extrapolates.
            adain: give the codes the mean and deviation of the input's latent, channel by channel.
            code_only: predict codes and decode nothing.
            detach_codes: keep gradients of the picture away from the codebook.
            code_lookup: who chooses the codes: the transformer, or the distance to the input's latent, which is what
                a plain autoencoder would do.

        Raises:
            ImageError: pictures of another shape.
            ValueError: w above 0 without fusion layers.
        """
        size = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            raise ImageError(f"faces of shape {tuple(image.shape)} are given, expected (B, 3, {size}, {size})")
        if code_lookup not in get_args(CodeLookup):
            raise ValueError(f"code_lookup={code_lookup!r} is given, expected one of {get_args(CodeLookup)}")
        is_fused = not code_only and bool((torch.as_tensor(w) > 0).any())
        if is_fused and not self.fusions:
            raise ValueError(f"w={w} needs fusion layers, which this CodeFormer was trained without; give w=0")
        lq_feat, taps = self.vqgan.encoder(image, self.fused_levels if is_fused else ())
        logits = None
        if code_lookup == "transformer":
            logits = self.predict_codes(lq_feat)
            indices = logits.argmax(dim=-1).view(len(image), *lq_feat.shape[2:])
        else:
            indices = self.vqgan.quantizer.nearest(lq_feat)
        if code_only:
            return CodeFormerOutput(None, logits, lq_feat, indices)

        # the decoder, and what is fused into it, may be kept in a higher precision than the rest
        codes = self.vqgan.quantizer.lookup(indices).to(self.vqgan.decoder.dtype)
        if detach_codes:
            codes = codes.detach()
        if adain:
            codes = match_statistics(codes, lq_feat.to(codes.dtype))
        fusions = {
            level: partial(self.fusions[self.fused_levels[level]], tap.detach(), w=w) for level, tap in taps.items()
        }
        return CodeFormerOutput(self.vqgan.decoder(codes, fusions), logits, lq_feat, indices)

    def predict_codes(self, lq_feat: Tensor) -> Tensor:
        """Logits (B, h * w, codes) of the codes of the high-quality face, from the latent (B, C, h, w) of the input."""
        tokens = self.proj_in(lq_feat.flatten(2).transpose(1, 2))
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(layer, tokens, self.positions)
            else:
                tokens = layer(tokens, self.positions)
        return self.to_logits(self.norm_out(tokens))


class CodeTransformerLayer(nn.Module):
    """Self-attention and MLP, each normalised before (Xiong et al. 2020); queries and keys know their position."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CodeAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, N, dim); positions (N, dim), or one set per sample."""
        values = self.norm1(tokens)
        queries = values + positions
        tokens = tokens + self.attention(queries, values)
        return tokens + self.mlp(self.norm2(tokens))


class CodeAttention(nn.Module):
    """Attention with the names and numbers of nn.MultiheadAttention.

    That one reads the weights of `out_proj` without calling it, so that offloading leaves them where they are.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """What each token gathers, (B, N, dim), of queries, which are the keys too, and values, both (B, N, dim)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, queries, values), weights, biases, strict=True)
        )
        gathered: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return gathered


class ControllableFeatureTransform(nn.Module):
    """CFT: h + w * (h * scale + shift), both from the input's features and the decoder's (Zhou et al. 2022, eq. 4)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.merge = ResidualBlock(2 * channels, channels, groups)
        self.scale = self._branch(channels)
        self.shift = self._branch(channels)

    @staticmethod
    def _branch(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, features: Tensor, h: Tensor, w: float | Tensor) -> Tensor:
        """Decoder features (B, C, H, W), with the encoder's of the same shape fused in; w as in CodeFormer."""
        merged = self.merge(torch.cat([features.to(h.dtype), h], dim=1))
        correction = torch.addcmul(self.shift(merged), h, self.scale(merged))
        if isinstance(w, Tensor):
            return torch.addcmul(h, w.to(h).view(-1, 1, 1, 1), correction)
        return torch.add(h, correction, alpha=w)


def match_statistics(content: Tensor, style: Tensor) -> Tensor:
    """Content (B, C, h, w) with the mean and standard deviation of style, channel by channel (AdaIN, Huang and
    Belongie 2017, eq. 8). Variances are unbiased and raised by 1e-5."""
    variance, mean = torch.var_mean(content, dim=(2, 3), keepdim=True)
    style_variance, style_mean = torch.var_mean(style, dim=(2, 3), keepdim=True)
    return (content - mean) / (variance + 1e-5).sqrt() * (style_variance + 1e-5).sqrt() + style_mean
