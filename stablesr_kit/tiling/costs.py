"""What networks cost, counted by running them without values: bytes alive at once, and floating-point operations."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stablesr_kit.imaging.canvas import Canvas, Readable, Region
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.tiling.autoencoder import APPROXIMATE_HALO, SAMPLED_PATCH, SAMPLED_PATCHES
from stablesr_kit.tiling.feature_maps import FeatureMap, Workspace
from stablesr_kit.tiling.moments import sums_of
from stablesr_kit.tiling.walk import decoded, encoded

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """peak_bytes: of what is alive at once, weights not counted, nor what kernels need inside. flops: operations."""

    peak_bytes: int
    flops: float


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and still alive while it is open; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and _key(one) not in given and _key(one) not in self._known:
                storage = one.untyped_storage()
                self._known[_key(one)] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, _key(one))
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def without_values(network: Any, dtype: torch.dtype) -> Any:
    """The network of the same config on the meta device, where it computes shapes only."""
    kind = type(getattr(network, "_orig_mod", network))  # of what torch.compile wraps
    with META:
        built: ModelMixin = kind.from_config(network.config)
    return nn.Module.to(built, dtype).eval()


def weight_bytes(network: nn.Module) -> int:
    """Size of its parameters and buffers."""
    return sum(one.numel() * one.element_size() for one in (*network.parameters(), *network.buffers()))


@torch.no_grad()
def prediction_cost(
    unet: UNet2DConditionModel, adapter: StableSRAdapter, tile: tuple[int, int], batch_size: int, branches: int = 1
) -> Cost:
    """Of one prediction for a batch of tiles of latents; the networks are on the meta device.

    branches: 2 with guidance. Attention is taken to be fused, as torch has it for CPUs and GPUs.
    """
    latents = torch.empty(batch_size, unet.config.in_channels, *tile, dtype=unet.dtype, device=META)
    prompts = torch.empty(branches * batch_size, 77, unet.config.cross_attention_dim, dtype=unet.dtype, device=META)
    return _counted(lambda: steered_prediction(unet, adapter, latents, 500, latents, prompts, 2.0))


@torch.no_grad()
def coding_costs(
    vae: AutoencoderKL,
    cfw: ControllableFeatureWrapping | None,
    height: int,
    width: int,
    tile_px: int,
    window: int | None = None,
) -> tuple[Cost, Cost]:
    """Of encoding and of decoding a picture of height x width pixels in exact tiles; networks on the meta device.

    cfw: None counts the plain decode. window: as `TiledAutoencoder`; None is global attention.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    levels = tuple(cfw.config.levels) if cfw is not None else ()
    image = _Blank((vae.config.in_channels, height, width), torch.float32)
    z = _Blank((vae.config.latent_channels, height // factor, width // factor), torch.float32)
    features: dict[int, Readable] = {}
    encoding = _OneTilePerMap.for_(vae, tile_px)
    features.update(encoded(vae, image, levels, encoding, window)[1])
    decoding = _OneTilePerMap.for_(vae, tile_px)
    decoded(vae, cfw, z, features, 1.0, decoding, window)
    return encoding.cost, decoding.cost


def approximate_coding_costs(
    vae: AutoencoderKL,
    cfw: ControllableFeatureWrapping | None,
    height: int,
    width: int,
    tile_px: int,
    window: int | None = None,
) -> tuple[Cost, Cost]:
    """As `coding_costs` in the approximate mode: exact tiles of the sample, then each tile through all layers."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    longest = SAMPLED_PATCHES * SAMPLED_PATCH * factor
    sample = coding_costs(vae, cfw, min(height, longest), min(width, longest), tile_px, window)
    side = tile_px // factor - 2 * APPROXIMATE_HALO
    tiles = math.ceil(height / factor / side) * math.ceil(width / factor / side)
    tile = coding_costs(vae, cfw, min(height, tile_px), min(width, tile_px), max(height, width))
    encoding, decoding = (
        Cost(peak_bytes=max(one.peak_bytes, other.peak_bytes), flops=one.flops + tiles * other.flops)
        for one, other in zip(sample, tile, strict=True)
    )
    return encoding, decoding


@torch.no_grad()
def whole_coding_costs(
    vae: AutoencoderKL, cfw: ControllableFeatureWrapping | None, height: int, width: int, pictures: int = 1
) -> tuple[Cost, Cost, int]:
    """As `coding_costs` without tiles, for several pictures at once, and the bytes that CFW's features keep between."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    levels = tuple(cfw.config.levels) if cfw is not None else ()
    image = torch.empty(pictures, vae.config.in_channels, height, width, dtype=vae.dtype, device=META)
    size = height // factor, width // factor
    z = torch.empty(pictures, vae.config.latent_channels, *size, dtype=vae.dtype, device=META)
    features: dict[int, Tensor] = {}
    encoding = _counted(lambda: features.update(encode_with_features(vae, image, levels)[1]))
    if cfw is None:
        decoding = _counted(lambda: vae.decode(z))
    else:
        decoding = _counted(lambda: decode_with_features(vae, cfw, z, features, 1.0))
    kept = sum(one.nbytes for one in features.values())
    return encoding, replace(decoding, peak_bytes=decoding.peak_bytes + kept), kept


def _counted(run: Callable[[], object]) -> Cost:
    with FlopCounterMode(display=False) as operations, LiveBytes() as live, _FusedAttention():
        run()
    return Cost(peak_bytes=live.peak, flops=operations.get_total_flops())


class _FusedAttention(TorchFunctionMode):
    """Attention that never holds its scores, as the kernels of real devices; without values torch takes another."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        return fused(given["query"], given["key"], given["value"])[0]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class _Blank:
    """What is read like a canvas and has no values."""

    shape: tuple[int, int, int]
    dtype: torch.dtype

    def read(self, region: Region) -> Tensor:
        return torch.empty(1, self.shape[0], region.height, region.width, dtype=self.dtype, device=META)


class _Trusting(dict[nn.GroupNorm, tuple[Tensor, Tensor]]):
    """Statistics of any norm; there are none to look for."""

    def __contains__(self, norm: object) -> bool:
        return True

    def __missing__(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        blank = torch.empty(norm.num_channels, device=META)
        return blank, blank


@dataclass(kw_only=True)
class _OneTilePerMap(Workspace):
    """Computes one tile of each map, in its middle, and takes the others to cost as much per position."""

    cost: Cost = Cost(peak_bytes=0, flops=0)

    @classmethod
    def for_(cls, vae: AutoencoderKL, tile_px: int) -> Self:
        values = tile_px**2 * vae.config.block_out_channels[0]
        return cls(device=META, tile_values=values, statistics=_Trusting())

    def store(self, x: FeatureMap, *, side: int | None = None, with_moments: bool = True) -> Canvas:
        if x.canvas is None:
            channels, height, width = x.shape
            side = side or self.side(channels)
            tile = _middle(height, side), _middle(width, side)
            region = Region(tile[0][0], tile[1][0], tile[0][1], tile[1][1])
            dtypes: list[torch.dtype] = []

            def compute() -> None:
                values = x.read(region)
                dtypes.append(values.dtype)
                if with_moments:
                    sums_of(values)

            one = _counted(compute)
            tiles = height * width / (region.height * region.width)
            self.cost = Cost(
                peak_bytes=max(self.cost.peak_bytes, one.peak_bytes), flops=self.cost.flops + tiles * one.flops
            )
            blank = _Blank(x.shape, dtypes[0])
            x.canvas = cast(Canvas, blank)
            x.read = blank.read
            x.overwrites = None
        return x.canvas


def _middle(length: int, side: int) -> tuple[int, int]:
    start = max(length - side, 0) // 2 // 2 * 2
    return start, min(start + side, length)
