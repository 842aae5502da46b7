"""Attention of a whole feature map in bounded memory: global in chunks, or in windows at absolute positions."""

import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from stablesr_kit.imaging.canvas import Region, regions
from stablesr_kit.tiling.feature_maps import FeatureMap, Workspace, layer


def attended(x: FeatureMap, attention: Attention, workspace: Workspace, window: int | None) -> FeatureMap:
    """The map after self-attention over all its positions, with the residual connection; stored.

    window: None for all keys, else the side of the square of keys that a query sees. Squares of half that side share
    their keys, and lie where they do whatever the tile size, so the result does not depend on the tiling; a map no
    larger than the window is attended to globally.
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
    """Operations of the two products of attention: quadratic in the positions, linear with a window."""
    keys = positions if window is None else min(positions, window**2)
    return 4 * positions * keys * channels


def _chunked_attention(query: Tensor, kv: FeatureMap, chunks: list[Region], heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, (1, n, heads * d), float32, one chunk of keys after the other.

    The running maximum makes the sum independent of what comes first (Milakov and Gimelshein 2018, alg. 3).
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
    """The square of keys around a square of queries, moved inwards where the map ends."""
    top = min(max(region.top - window // 4, 0), max(height - window, 0))
    left = min(max(region.left - window // 4, 0), max(width - window, 0))
    return Region(top, left, min(top + window, height), min(left + window, width))
