"""The layers of a stock AutoencoderKL and of CFW as feature maps of a whole picture."""

import math
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch import Tensor, nn

from stablesr_kit.imaging.canvas import Canvas, Readable, Region, regions
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping, FusionLayer
from stablesr_kit.tiling.feature_maps import FeatureMap, Workspace, downsampled, layer, upsampled


def encoded(
    vae: AutoencoderKL, image: Readable, levels: tuple[int, ...], workspace: Workspace, window: int | None
) -> tuple[Canvas, dict[int, Canvas]]:
    """Moments (2 C, h, w) of an image (3, H, W), and the encoder's features at `levels`."""
    encoder = vae.encoder
    features = {}
    x = layer(workspace.source(image, vae.dtype), encoder.conv_in, encoder.conv_in.out_channels, halo=1)
    x.is_cheap = True
    for level, block in enumerate(encoder.down_blocks):
        for resnet in block.resnets:
            x = _residual_block(x, resnet, workspace)
        if level in levels:
            features[level] = workspace.store(x)
            x.is_kept = True
        for downsampler in block.downsamplers or ():
            x = downsampled(x, downsampler)
    x = _mid_block(x, encoder.mid_block, workspace, window)
    moments = _output(x, encoder, vae.quant_conv, workspace)
    return workspace.store(moments, side=workspace.side(x.shape[0]), with_moments=False), features


def decoded(
    vae: AutoencoderKL,
    cfw: ControllableFeatureWrapping | None,
    z: Readable,
    features: Mapping[int, Readable],
    w: float,
    workspace: Workspace,
    window: int | None,
) -> Canvas:
    """Image (3, H, W) of the raw code z (C, h, w); without cfw, features and w are ignored."""
    decoder = vae.decoder

    def read_in(tile: Tensor) -> Tensor:
        return decoder.conv_in(tile if vae.post_quant_conv is None else vae.post_quant_conv(tile))

    x = layer(workspace.source(z, vae.dtype), read_in, decoder.conv_in.out_channels, halo=1)
    x.is_cheap = True
    x = _mid_block(x, decoder.mid_block, workspace, window)
    for level, block in zip(reversed(range(len(decoder.up_blocks))), decoder.up_blocks, strict=True):
        for resnet in block.resnets:
            x = _residual_block(x, resnet, workspace)
        if cfw is not None and level in cfw.config.levels:
            x = _wrapped(x, features[level], cfw, level, w, workspace)
        for upsampler in block.upsamplers or ():
            x = upsampled(x, upsampler)
    image = _output(x, decoder, None, workspace)
    return workspace.store(image, side=workspace.side(x.shape[0]), with_moments=False)


def _mid_block(x: FeatureMap, block: UNetMidBlock2D, workspace: Workspace, window: int | None) -> FeatureMap:
    x = _residual_block(x, block.resnets[0], workspace)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x = attended(x, attention, workspace, window)
        x = _residual_block(x, resnet, workspace)
    return x


def _wrapped(
    x: FeatureMap,
    encoder_features: Readable,
    cfw: ControllableFeatureWrapping,
    level: int,
    w: float,
    workspace: Workspace,
) -> FeatureMap:
    """Decoder features + w * correction."""
    workspace.store(x, with_moments=False)
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
        ours = x.read(region)
        return (ours.to(cfw.dtype) + w * correction.read(region)).to(ours.dtype)

    return FeatureMap(x.shape, read, overwrites=x)


def _residual_block(x: FeatureMap, block: ResnetBlock2D, workspace: Workspace) -> FeatureMap:
    """x + conv(norm(conv(norm(x)))): only the map between the two norms is stored."""
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


def attended(x: FeatureMap, attention: Attention, workspace: Workspace, window: int | None) -> FeatureMap:
    """The map after self-attention over all its positions, with the residual connection; stored.

    window: side of the square of keys that a query sees; None is all keys. All queries in a square of half that side
    share their keys. These squares do not depend on the tile size, so neither does the result. A map no larger than
    the window gets global attention.
    """
    channels, height, width = x.shape
    norm = workspace.normalization(x, attention.group_norm)

    def keys_and_values(tile: Tensor) -> Tensor:
        rows = norm(tile).permute(0, 2, 3, 1)
        return torch.cat([attention.to_k(rows), attention.to_v(rows)], dim=3).permute(0, 3, 1, 2)

    inner = attention.to_k.out_features
    kv = layer(x, keys_and_values, 2 * inner, halo=0)
    workspace.store(kv, with_moments=False)
    side = max(math.isqrt(math.isqrt(workspace.tile_values)), 1)  # a chunk's scores are as many values as a tile's

    def read(region: Region) -> Tensor:
        tile = x.read(region)
        query = _heads(attention.to_q(norm(tile).permute(0, 2, 3, 1)), attention.heads)
        if window is None:
            chunks = list(regions(height, width, side))
        else:
            chunks = [_window(region, window, height, width)]
        rows = _chunked_attention(query, kv, chunks, attention.heads)
        rows = attention.to_out[1](attention.to_out[0](rows.to(tile.dtype)))
        out = rows.view(1, region.height, region.width, channels).permute(0, 3, 1, 2)
        return (out + tile if attention.residual_connection else out) / attention.rescale_output_factor

    result = FeatureMap(x.shape, read, overwrites=x)
    workspace.store(result, side=side if window is None else max(window // 2, 1))
    return result


def attention_flops(positions: int, channels: int, window: int | None = None) -> int:
    """Operations of the two matrix products of attention: quadratic in the positions, linear with a window."""
    keys = positions if window is None else min(positions, window**2)
    return 4 * positions * keys * channels


def _chunked_attention(query: Tensor, kv: FeatureMap, chunks: list[Region], heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, (1, n, heads * d), float32, one chunk of keys after the other.

    With the running maximum, chunks can be summed in any order (Milakov and Gimelshein 2018, alg. 3).
    """
    query = query * query.shape[-1] ** -0.5
    total = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    weight = total.new_zeros(*query.shape[:-1], 1)
    highest = torch.full_like(weight, -math.inf)
    for chunk in chunks:
        key, value = (_heads(part, heads) for part in kv.read(chunk).permute(0, 2, 3, 1).chunk(2, dim=3))
        scores = (query @ key.mT).float()
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        scores = scores.sub_(higher).exp_()
        decay = (highest - higher).exp()
        weight = weight * decay + scores.sum(-1, keepdim=True)
        total = total * decay + (scores.to(value.dtype) @ value).float()
        highest = higher
    return (total / weight).transpose(1, 2).flatten(2)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """(1, heads, h * w, d) of rows (1, h, w, heads * d)."""
    return rows.reshape(1, -1, heads, rows.shape[-1] // heads).transpose(1, 2)


def _window(region: Region, window: int, height: int, width: int) -> Region:
    """The square of keys around a square of queries, shifted to lie within the map."""
    top = min(max(region.top - window // 4, 0), max(height - window, 0))
    left = min(max(region.left - window // 4, 0), max(width - window, 0))
    return Region(top, left, min(top + window, height), min(left + window, width))
