"""How to restore a picture within a device's memory: tiles, batch, what it will take at most and how long."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.tiles import cover
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.pipelines.aggregation import LatentTiling
from stablesr_kit.pipelines.costs import Cost, coding_costs, prediction_cost, weight_bytes, without_values
from stablesr_kit.pipelines.planner import tile_multiple

RESERVE = 0.1  # of the budget, for what is not counted: the kernels' own buffers and the allocator's gaps
VAE_TILES_PX = (1024, 512, 256, 128, 64)
BATCHES = (8, 4, 2, 1)
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a call will do and what it takes.

    Attributes:
        tiling: how latents are sampled.
        vae_tile_px: tiles of the autoencoder and CFW.
        peak_bytes: the most the device holds: weights, and what is alive of the costliest stage.
        flops: operations of the whole call.
        attention_flops: those of them that global attention in the autoencoder costs beyond attention in windows.
        seconds: flops at the rate that matrices were multiplied with on the device; an estimate.
    """

    tiling: LatentTiling
    vae_tile_px: int
    peak_bytes: int
    flops: float
    attention_flops: float
    seconds: float

    def __str__(self) -> str:
        height, width = self.tiling.tile
        line = (
            f"plan: tiles of {height} x {width} latents, {self.tiling.batch_size} at once, autoencoder tiles of "
            f"{self.vae_tile_px} px, at most {self.peak_bytes / GIB:.2f} GiB on the device, about {self.seconds:.0f} s"
        )
        if self.attention_flops > self.flops / 2:
            line += "; most of it is global attention in the autoencoder, vae_attention='windowed' avoids it"
        return line


class Planner:
    """Plans calls of a pipeline's networks, which are counted and not changed.

    Args:
        vae, unet, adapter: of the pipeline, on any device, "meta" included.
        cfw: None plans for w = 0.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter,
        cfw: ControllableFeatureWrapping | None = None,
    ) -> None:
        networks = [vae, unet, adapter, *([] if cfw is None else [cfw])]
        self.weights = sum(weight_bytes(network) for network in networks)
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        coding_dtype = torch.float32 if upcast else vae.dtype
        if upcast:
            self.weights += weight_bytes(vae) + (0 if cfw is None else weight_bytes(cfw))
        self.vae = without_values(vae, coding_dtype)
        self.cfw = None if cfw is None else without_values(cfw, coding_dtype)
        self.unet = without_values(unet, unet.dtype)
        self.adapter = without_values(adapter, adapter.dtype)

    def plan(
        self,
        height: int,
        width: int,
        tiling: LatentTiling,
        steps: int,
        budget_bytes: int,
        *,
        branches: int = 1,
        window: int | None = None,
        may_batch: bool = True,
        flops_per_second: float = 1e12,
    ) -> MemoryPlan:
        """The largest tiles that fit.

        height, width: of the canvas in pixels. tiling: what is wanted; it is halved until it fits. branches: 2 with
        guidance. window: of the autoencoder's attention, None is global. may_batch: several tiles at once, where that
        is faster. flops_per_second: as `measured_rate` gives it.

        Raises:
            ConfigError: even the smallest tiles need more.
        """
        available = int(budget_bytes * (1 - RESERVE)) - self.weights
        sampling, prediction = self._sampling(tiling, branches, may_batch, available)
        vae_tile_px, (encoding, decoding) = self._coding(height, width, window, available)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        tiles = len(cover(height // factor, width // factor, sampling.tile, sampling.overlap))
        coding_flops = encoding.flops + decoding.flops
        flops = steps * tiles * prediction.flops / sampling.batch_size + coding_flops
        attention_flops = 0.0
        if window is None:
            windowed = coding_costs(self.vae, self.cfw, height, width, vae_tile_px, window=64)
            attention_flops = coding_flops - sum(cost.flops for cost in windowed)
        return MemoryPlan(
            tiling=sampling,
            vae_tile_px=vae_tile_px,
            peak_bytes=self.weights + max(cost.peak_bytes for cost in (prediction, encoding, decoding)),
            flops=flops,
            attention_flops=attention_flops,
            seconds=flops / flops_per_second,
        )

    def _sampling(
        self, wanted: LatentTiling, branches: int, may_batch: bool, available: int
    ) -> tuple[LatentTiling, Cost]:
        smaller: LatentTiling | None = replace(wanted, batch_size=BATCHES[0] if may_batch else 1)
        while smaller is not None:
            tiling = smaller
            cost = prediction_cost(self.unet, self.adapter, tiling.tile, tiling.batch_size, branches)
            if cost.peak_bytes <= available:
                return tiling, cost
            smaller = tiling.halved(tile_multiple(self.unet))
        raise self._too_little(cost, available)

    def _coding(self, height: int, width: int, window: int | None, available: int) -> tuple[int, tuple[Cost, Cost]]:
        for tile_px in VAE_TILES_PX:
            costs = coding_costs(self.vae, self.cfw, height, width, tile_px, window)
            if max(cost.peak_bytes for cost in costs) <= available:
                return tile_px, costs
        raise self._too_little(max(costs, key=lambda cost: cost.peak_bytes), available)

    def _too_little(self, cost: Cost, available: int) -> ConfigError:
        budget = (available + self.weights) / (1 - RESERVE)
        needed = (cost.peak_bytes + self.weights) / (1 - RESERVE)
        return ConfigError(
            f"{budget / GIB:.2f} GiB of memory are too few, expected at least {needed / GIB:.2f} for these networks "
            f"({self.weights / GIB:.2f} are weights); allow more, or load the pipeline in half precision"
        )


def free_bytes(device: torch.device) -> int:
    """What the device can still give, and what this process holds of it already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def measured_rate(device: torch.device, dtype: torch.dtype, side: int = 512) -> float:
    """Operations per second of a product of two square matrices, the second of two tries."""
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / [_seconds(lambda: (matrix @ matrix).sum().item()) for _ in range(2)][1]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
