"""Encoding and decoding of pictures of any size, tile by tile and yet equal to the whole picture at once."""

from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import Canvas, Readable, Region
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping, FusionLayer
from stablesr_kit.pipelines.canvas_attention import attended
from stablesr_kit.pipelines.feature_maps import FeatureMap, Workspace, downsampled, layer, upsampled

AttentionMode = Literal["global", "windowed"]


class TiledAutoencoder:
    """A stock AutoencoderKL, with CFW if wanted, run layer by layer over tiles.

    Every layer sees its true neighbours, every group norm the statistics of the whole picture, and attention all of it,
    so that the result is that of the networks themselves; in float32 the difference stays below 1e-4. The device holds
    tiles only; feature maps lie on canvases. The networks are used as they are and not changed.

    Args:
        vae: the autoencoder.
        cfw: the fusion layers for it; None allows w = 0 only.
        tile_px: side of a tile at the picture's resolution; deeper layers use tiles of as many values.
        attention: "global", or "windowed" for pictures whose size makes global attention, which is quadratic, too slow.
        window: side, in latent positions, of the square that windowed attention sees.
        folder: where the canvases are; None keeps them in memory.
        canvas_dtype: dtype of the feature maps' canvases; half precision halves them and costs exactness.

    Raises:
        ConfigError: an option means nothing, or the autoencoder has blocks that the stock ones do not.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        cfw: ControllableFeatureWrapping | None = None,
        *,
        tile_px: int = 512,
        attention: AttentionMode = "global",
        window: int = 64,
        folder: Path | None = None,
        canvas_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_blocks(vae)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if tile_px < factor:
            raise ConfigError(f"tile_px={tile_px} is smaller than one latent position; give at least {factor}")
        if attention not in get_args(AttentionMode):
            raise ConfigError(f"attention={attention!r} is given, expected one of {get_args(AttentionMode)}")
        if window < 4:
            raise ConfigError(f"window={window} is given, expected at least 4 latent positions")
        self.vae = vae
        self.cfw = cfw
        self.tile_px = tile_px
        self.window = window if attention == "windowed" else None
        self.folder = folder
        self.canvas_dtype = canvas_dtype
        self.factor = factor

    def encode(self, image: Readable | Tensor) -> Canvas:
        """Moments (2 C, h, w) of the raw code's posterior: mean, then log variance as the encoder gives it.

        image: (3, H, W) in [-1, 1]: a canvas, anything that reads like one, or a tensor (1, 3, H, W). Sides that are no
        multiples of the autoencoder's factor lose the rest, as in the autoencoder itself.
        """
        return self.encode_with_features(image, ())[0]

    @torch.no_grad()
    def encode_with_features(
        self, image: Readable | Tensor, levels: tuple[int, ...]
    ) -> tuple[Canvas, dict[int, Canvas]]:
        """Moments as `encode` gives them, and canvases of the encoder's features (C, H / 2**level, W / 2**level)."""
        image = Canvas.from_tensor(image) if isinstance(image, Tensor) else image
        self._check_image(image, levels)
        _bring_to_device(self.vae)
        workspace, encoder = self._workspace(), self.vae.encoder
        features = {}
        x = layer(workspace.source(image, self.vae.dtype), encoder.conv_in, encoder.conv_in.out_channels, halo=1)
        x.is_cheap = True
        for level, block in enumerate(encoder.down_blocks):
            for resnet in block.resnets:
                x = _residual_block(x, resnet, workspace)
            if level in levels:
                features[level] = workspace.store(x)
                x.is_kept = True
            for downsampler in block.downsamplers or ():
                x = downsampled(x, downsampler)
        x = self._mid_block(x, encoder.mid_block, workspace)
        moments = _output(x, encoder, self.vae.quant_conv, workspace)
        return workspace.store(moments, with_moments=False), features

    @torch.no_grad()
    def decode(self, z: Readable | Tensor, features: dict[int, Canvas] | None = None, w: float = 0.0) -> Canvas:
        """Image (3, H, W), about [-1, 1], of the raw code z (C, h, w), with the LQ picture's features wrapped in.

        z: a canvas, anything that reads like one, or a tensor (1, C, h, w).
        features: of `encode_with_features` at the levels of CFW; they are not changed. None if w is 0.
        w: 0 is the plain decode, 1 what CFW was trained for.
        """
        z = Canvas.from_tensor(z) if isinstance(z, Tensor) else z
        fused = self._features_for(z, features, w)
        _bring_to_device(self.vae)
        workspace, decoder = self._workspace(), self.vae.decoder

        def read_in(tile: Tensor) -> Tensor:
            return decoder.conv_in(tile if self.vae.post_quant_conv is None else self.vae.post_quant_conv(tile))

        x = layer(workspace.source(z, self.vae.dtype), read_in, decoder.conv_in.out_channels, halo=1)
        x.is_cheap = True
        x = self._mid_block(x, decoder.mid_block, workspace)
        for level, block in zip(reversed(range(len(decoder.up_blocks))), decoder.up_blocks, strict=True):
            for resnet in block.resnets:
                x = _residual_block(x, resnet, workspace)
            if level in fused:
                x = self._wrapped(x, fused[level], level, w, workspace)
            for upsampler in block.upsamplers or ():
                x = upsampled(x, upsampler)
        return workspace.store(_output(x, decoder, None, workspace), with_moments=False)

    def _mid_block(self, x: FeatureMap, block: UNetMidBlock2D, workspace: Workspace) -> FeatureMap:
        x = _residual_block(x, block.resnets[0], workspace)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x = attended(x, attention, workspace, self.window)
            x = _residual_block(x, resnet, workspace)
        return x

    def _wrapped(
        self, x: FeatureMap, encoder_features: Canvas, level: int, w: float, workspace: Workspace
    ) -> FeatureMap:
        """Decoder features + w * correction."""
        assert self.cfw is not None
        cfw = self.cfw
        _bring_to_device(cfw)
        workspace.store(x)
        theirs = workspace.source(encoder_features, cfw.dtype)
        fusion: FusionLayer = dict(zip(cfw.config.levels, cfw.fusion_layers.values(), strict=True))[level]
        h = FeatureMap(
            (2 * x.shape[0], *x.shape[1:]),
            lambda region: torch.cat([theirs.read(region), x.read(region).to(cfw.dtype)], dim=1),
            is_cheap=True,
        )
        h = _residual_block(h, fusion.merge, workspace)
        for rrdb in fusion.rrdbs:
            workspace.store(h, with_moments=False)
            h = layer(h, rrdb, h.shape[0], halo=sum(isinstance(part, nn.Conv2d) for part in rrdb.modules()))
        correction = _residual_block(h, fusion.refine, workspace)

        def read(region: Region) -> Tensor:
            return (x.read(region).to(cfw.dtype) + w * correction.read(region)).to(self.vae.dtype)

        return FeatureMap(x.shape, read, overwrites=x)

    def _workspace(self) -> Workspace:
        return Workspace(
            device=next(self.vae.parameters()).device,
            tile_values=self.tile_px**2 * self.vae.config.block_out_channels[0],
            canvas_dtype=self.canvas_dtype,
            folder=self.folder,
        )

    def _check_image(self, image: Readable, levels: tuple[int, ...]) -> None:
        channels, height, width = image.shape
        if channels != self.vae.config.in_channels or min(height, width) < self.factor:
            raise ValueError(
                f"an image of {channels} x {height} x {width} is given, expected {self.vae.config.in_channels} "
                f"channels and sides of at least {self.factor} px"
            )
        available = range(len(self.vae.config.block_out_channels))
        if not set(levels) <= set(available):
            raise ValueError(f"features of levels {levels} are asked for, expected some of {list(available)}")

    def _features_for(self, z: Readable, features: dict[int, Canvas] | None, w: float) -> dict[int, Canvas]:
        """The features that CFW fuses, by level; none if w is 0."""
        channels, height, width = z.shape
        if channels != self.vae.config.latent_channels:
            raise ValueError(f"z has {channels} channels, expected {self.vae.config.latent_channels}")
        if w == 0:
            return {}
        if self.cfw is None or features is None:
            raise ValueError(f"w={w} needs cfw and the features of encode_with_features; give both, or w=0")
        for level, wide in zip(self.cfw.config.levels, self.cfw.config.channels, strict=True):
            scale = self.factor // 2**level
            expected = (wide, height * scale, width * scale)
            if level not in features or features[level].shape != expected:
                given = features[level].shape if level in features else "nothing"
                raise ValueError(f"features of level {level} are {given}, expected {expected} for z of {z.shape}")
        return {level: features[level] for level in self.cfw.config.levels}


def _residual_block(x: FeatureMap, block: ResnetBlock2D, workspace: Workspace) -> FeatureMap:
    """x + conv(norm(conv(norm(x)))): the map between the two norms is stored, the result is left to its reader."""
    norm1 = workspace.normalization(x, block.norm1, block.nonlinearity)
    h = layer(x, lambda tile: block.conv1(norm1(tile)), block.out_channels, halo=1)
    norm2 = workspace.normalization(h, block.norm2, block.nonlinearity)
    residual = layer(h, lambda tile: block.conv2(norm2(tile)), block.out_channels, halo=1)

    def read(region: Region) -> Tensor:
        shortcut = x.read(region)
        if block.conv_shortcut is not None:
            shortcut = block.conv_shortcut(shortcut)
        return (shortcut + residual.read(region)) / block.output_scale_factor

    return FeatureMap(residual.shape, read, overwrites=x if block.conv_shortcut is None else None)


def _output(x: FeatureMap, coder: Encoder | Decoder, quant_conv: nn.Conv2d | None, workspace: Workspace) -> FeatureMap:
    norm = workspace.normalization(x, coder.conv_norm_out, coder.conv_act)

    def write_out(tile: Tensor) -> Tensor:
        tile = coder.conv_out(norm(tile))
        return tile if quant_conv is None else quant_conv(tile)

    return layer(x, write_out, coder.conv_out.out_channels, halo=1)


@apply_forward_hook
def _bring_to_device(_network: nn.Module) -> None:
    """Let the hook of an offloaded network bring it to its device, as a call of it would."""


def _check_blocks(vae: AutoencoderKL) -> None:
    """Refuse what the walk through the layers does not know."""
    blocks = [*vae.encoder.down_blocks, vae.encoder.mid_block, *vae.decoder.up_blocks, vae.decoder.mid_block]
    for block in blocks:
        parts = [
            *block.resnets,
            *(getattr(block, "downsamplers", None) or ()),
            *(getattr(block, "upsamplers", None) or ()),
        ]
        known = isinstance(block, DownEncoderBlock2D | UNetMidBlock2D | UpDecoderBlock2D) and all(
            isinstance(part, ResnetBlock2D | Downsample2D | Upsample2D) for part in parts
        )
        if not known:
            raise ConfigError(
                f"the autoencoder has a {type(block).__name__}, which cannot be tiled exactly; "
                "expected the blocks DownEncoderBlock2D, UNetMidBlock2D and UpDecoderBlock2D of AutoencoderKL"
            )
