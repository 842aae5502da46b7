"""Controllable feature wrapping (CFW): the LQ picture's fidelity in the decoder (Wang et al. 2023, eq. 5)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.execution import use_large_group_norms

RESIDUAL_SCALE = 0.2


def scaled_sum(x: Tensor, scale: float, residual: Tensor) -> Tensor:
    """x + scale * residual, in x's layout; in place where no gradient is asked for: the residual is nobody else's."""
    if torch.is_grad_enabled() or x.dtype != residual.dtype or x.stride() != residual.stride():
        return x + scale * residual
    return residual.mul_(scale).add_(x)


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
            dense = torch.cat([dense, F.leaky_relu(conv(dense), 0.2, inplace=True)], dim=1)
        return scaled_sum(x, RESIDUAL_SCALE, self.convs[-1](dense))


class RRDB(nn.Module):
    """Three residual dense blocks in a residual of their own (Wang et al. 2018, ESRGAN, fig. 4)."""

    def __init__(self, channels: int, growth_channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualDenseBlock(channels, growth_channels) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_sum(x, RESIDUAL_SCALE, self.blocks(x))


class FusionLayer(nn.Module):
    """The correction that one level of encoder features adds to the decoder features of the same level."""

    def __init__(self, channels: int, num_rrdb: int, growth_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        norm = {"temb_channels": None, "groups": norm_num_groups, "eps": 1e-6}
        self.merge = ResnetBlock2D(in_channels=2 * channels, out_channels=channels, **norm)
        self.rrdbs = nn.Sequential(*(RRDB(channels, growth_channels) for _ in range(num_rrdb)))
        self.refine = ResnetBlock2D(in_channels=channels, out_channels=channels, **norm)
        use_large_group_norms(self)

    def forward(self, encoder_features: Tensor, decoder_features: Tensor) -> Tensor:
        """Correction (b, C, h, w) of two features (b, C, h, w)."""
        h = torch.cat([encoder_features, decoder_features], dim=1)
        # the many narrow convolutions take half the time in this layout (bfloat16 on CPU)
        h = self.merge(h.contiguous(memory_format=torch.channels_last), None)
        return self.refine(self.rrdbs(h), None)


@dataclass
class Kept:
    """The correction of the level that is fused first, before any w counts: for decoding again with another one."""

    correction: Tensor | None = None


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

    @torch.no_grad()
    def grown(self, num_rrdb: int) -> Self:
        """The same function with more RRDBs per fusion layer, in float32: a start for training larger ones.

        A new RRDB whose dense blocks add nothing multiplies by 1 + RESIDUAL_SCALE. What leads to it is divided by as
        much before, since convolutions and leaky ReLUs scale with their input and their biases.

        Raises:
            ConfigError: num_rrdb is less than there are.
        """
        old = self.config.num_rrdb
        if num_rrdb < old:
            raise ConfigError(f"num_rrdb={num_rrdb} is given, expected at least the {old} of this cfw")
        grown = type(self).from_config(self.config, num_rrdb=num_rrdb)
        grown.load_state_dict(self.state_dict(), strict=False)
        scale = (1 + RESIDUAL_SCALE) ** (old - num_rrdb)
        for layer in grown.fusion_layers.values():
            for conv in (layer.merge.conv2, layer.merge.conv_shortcut):
                for parameter in conv.parameters():
                    parameter *= scale
            for i, rrdb in enumerate(layer.rrdbs):
                for block in rrdb.blocks:
                    if i >= old:
                        block.convs[-1].weight.zero_()
                        block.convs[-1].bias.zero_()
                    else:
                        for conv in block.convs:
                            conv.bias *= scale
        return grown

    def forward(
        self, level: int, encoder_features: Tensor, decoder_features: Tensor, w: float, kept: Kept | None = None
    ) -> Tensor:
        """Wrapped decoder features (b, C, h, w) of one fused level; kept: is filled, and used where it is filled."""
        correction = None if kept is None else kept.correction
        if correction is None:
            layer = dict(zip(self.config.levels, self.fusion_layers.values(), strict=True))[level]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                correction = self._gradient_checkpointing_func(layer, encoder_features, decoder_features)
            else:
                correction = layer(encoder_features, decoder_features)
        if kept is None:
            return scaled_sum(decoder_features, w, correction)
        kept.correction = correction
        return decoder_features + w * correction  # not in place: the correction is kept


def check_autoencoder(vae: AutoencoderKL, cfw: ControllableFeatureWrapping | None) -> None:
    """Raises ConfigError if the autoencoder is of another class, or the fusion layers were made for another one."""
    bare = getattr(vae, "_orig_mod", vae)  # torch.compile wraps the module
    if not isinstance(bare, AutoencoderKL):
        raise ConfigError(
            f"{type(bare).__name__} is given as vae, expected AutoencoderKL, whose latents the UNet knows and whose "
            "features CFW fuses"
        )
    if cfw is None:
        return
    widths = dict(enumerate(vae.config.block_out_channels))
    for level, width in zip(cfw.config.levels, cfw.config.channels, strict=True):
        if widths.get(level) != width:
            raise ConfigError(
                f"a cfw of another autoencoder is given: it fuses {width} channels at level {level}, this autoencoder "
                f"has widths {tuple(widths.values())}; give the cfw that was trained with it, or none"
            )


def scale_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent position along a side: every level but the last halves the picture."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def encode_with_features(
    vae: AutoencoderKL, image: Tensor, levels: tuple[int, ...]
) -> tuple[DiagonalGaussianDistribution, dict[int, Tensor]]:
    """Posterior of the raw code, and the encoder's features at `levels`, of one pass through the stock encoder.

    image: (b, 3, H, W) in [-1, 1], H and W multiples of the autoencoder's factor. Features: level -> (b, C,
    H / 2**level, W / 2**level), taken after the level's residual blocks.

    Raises:
        ConfigError: the autoencoder would encode in tiles of its own, or its encoder is compiled.
    """
    if not levels:
        return vae.encode(image).latent_dist, {}
    _check_whole(vae, image, vae.tile_sample_min_size)
    slices: dict[int, list[Tensor]] = {level: [] for level in levels}
    with _after_levels(vae, "encode", levels, lambda level, h: slices[level].append(h)):
        posterior = vae.encode(image).latent_dist
    features = {level: parts[0] if len(parts) == 1 else torch.cat(parts) for level, parts in slices.items() if parts}
    _check_seen({level: len(maps) for level, maps in features.items()}, levels, len(image))
    return posterior, features


def decode_with_features(
    vae: AutoencoderKL,
    cfw: ControllableFeatureWrapping,
    z: Tensor,
    features: dict[int, Tensor],
    w: float,
    kept: dict[int, Kept] | None = None,
) -> Tensor:
    """Image (b, 3, H, W), about [-1, 1], of the raw code z (b, C, h, w), with the LQ picture's features wrapped in.

    w: 0 is the plain decode (realism), 1 what the fusion layers were trained for (fidelity); above 1 extrapolates.
    kept: of an earlier call with the same z and features, or empty, to be filled: it takes a fifth of the time off.

    Raises:
        ConfigError: the autoencoder would decode in tiles of its own, its decoder is compiled, or it checkpoints
            gradients, of which a second pass would lack the features.
    """
    _check_whole(vae, z, vae.tile_latent_min_size)
    if torch.is_grad_enabled() and vae.decoder.gradient_checkpointing:
        raise ConfigError(
            "the autoencoder checkpoints gradients, which repeats its decoding without the features of CFW; "
            "call vae.disable_gradient_checkpointing()"
        )
    levels = tuple(cfw.config.levels)
    seen = dict.fromkeys(levels, 0)

    def wrap(level: int, h: Tensor) -> Tensor:
        first = seen[level]
        encoder_features = features[level][first : first + len(h)]  # the autoencoder may slice the batch
        seen[level] += len(h)
        of_level = kept.setdefault(first, Kept()) if kept is not None and level == max(levels) else None
        wrapped: Tensor = cfw(level, encoder_features.to(cfw.dtype), h.to(cfw.dtype), w, of_level)
        return wrapped.to(h.dtype)

    with _after_levels(vae, "decode", levels, wrap):
        image: Tensor = vae.decode(z, return_dict=False)[0]
    _check_seen(seen, levels, len(z))
    return image


@contextmanager
def _after_levels(
    vae: AutoencoderKL,
    doing: Literal["encode", "decode"],
    levels: tuple[int, ...],
    act: Callable[[int, Tensor], Tensor | None],
) -> Iterator[None]:
    """Calls `act(level, features)` after the residual blocks of a level; what it returns goes on instead.

    Hooks on the blocks do it, so that the autoencoder runs as it does without: offloaded, sliced, cast. They are for
    this thread alone: others may use the autoencoder meanwhile. Raises ConfigError where hooks would not be called.
    """
    part = vae.encoder if doing == "encode" else vae.decoder
    blocks = part.down_blocks if doing == "encode" else part.up_blocks[::-1]
    resnets = {level: blocks[level].resnets[-1] for level in levels}
    for module in (getattr(vae, doing), part, *(blocks[level] for level in levels), *resnets.values()):
        if is_compiled(module):
            raise ConfigError(
                f"the autoencoder's {doing}r is compiled, which hides its features from CFW; "
                "give the autoencoder uncompiled (cfw and unet may be compiled), or w=0"
            )
    level_of = {resnet: level for level, resnet in resnets.items()}
    with after_each(resnets.values(), lambda resnet, h: act(level_of[resnet], h)):
        yield


_registering = Lock()


@contextmanager
def after_each(modules: Iterable[nn.Module], act: Callable[[nn.Module, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `act(module, output)` whenever this thread has run one of the modules; what it returns goes on instead."""
    thread = get_ident()

    def hook(module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        return act(module, output) if get_ident() == thread else None

    with _registering:  # torch numbers hooks without a lock
        handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_compiled(part: Any) -> bool:
    """Whether a module or function is compiled itself: hooks inside of it are not called."""
    return getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_torchdynamo_orig_callable")


def _check_whole(vae: AutoencoderKL, x: Tensor, tile: int) -> None:
    """Raises ConfigError if the autoencoder would take x (b, C, h, w) in tiles."""
    if vae.use_tiling and max(x.shape[-2:]) > tile:
        raise ConfigError(
            f"vae.enable_tiling() is on and {x.shape[-2]} x {x.shape[-1]} is larger than its tile of {tile}: its tiles "
            "have no common features for CFW; call vae.disable_tiling() and tile exactly, see TiledAutoencoder"
        )


def _check_seen(seen: dict[int, int], levels: tuple[int, ...], batch: int) -> None:
    if any(seen.get(level) != batch for level in levels):
        raise ConfigError(
            f"of {batch} pictures the autoencoder showed features of {seen} (level: pictures); "
            "give a stock AutoencoderKL, uncompiled"
        )
