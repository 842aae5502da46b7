"""How to restore a picture within a device's memory: tiles, batch, what it will take at most and how long."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from stablesr_kit.errors import ConfigError, JobError
from stablesr_kit.imaging.tiles import cover
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.storage import replacing_file
from stablesr_kit.tiling.autoencoder import WINDOW, TilingMode
from stablesr_kit.tiling.canvas_attention import attention_flops
from stablesr_kit.tiling.costs import (
    Cost,
    approximate_coding_costs,
    coding_costs,
    prediction_cost,
    weight_bytes,
    whole_coding_costs,
    without_values,
)
from stablesr_kit.tiling.latents import LatentTiling

RESERVE = 0.1  # of the budget, for what is not counted: the kernels' own buffers and the allocator's gaps
GIB = 2**30

Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a call will do and what it takes.

    Attributes:
        tiling: how latents are sampled; None as a whole.
        vae_tile_px: tiles of the autoencoder and CFW; None for the picture as a whole.
        peak_bytes: the most the device holds: weights, and what is alive of the costliest stage.
        flops: operations of the whole call.
        attention_flops: those of them that global attention in the autoencoder costs beyond attention in windows.
        seconds: flops at the rate that matrices were multiplied with on the device; an estimate.
        is_reduced: whether the budget forced tiles of latents that are smaller than the wanted, which changes the
            picture; nothing else here does.
        max_memory: the bytes that were allowed; None for those that were free.
    """

    tiling: LatentTiling | None
    vae_tile_px: int | None
    peak_bytes: int
    flops: float
    attention_flops: float
    seconds: float
    is_reduced: bool = False
    max_memory: int | None = None

    def __str__(self) -> str:
        latents, picture = "latents as a whole", "autoencoder as a whole"
        if self.tiling is not None:
            height, width = self.tiling.tile
            latents = f"tiles of {height} x {width} latents, {self.tiling.batch_size} at once"
        if self.vae_tile_px is not None:
            picture = f"autoencoder tiles of {self.vae_tile_px} px"
        line = (
            f"plan: {latents}, {picture}, at most {_readable(self.peak_bytes)} on the device, "
            f"about {self.seconds:.0f} s"
        )
        if self.is_reduced:
            line += "; memory forces smaller tiles of latents than usual, which changes the picture"
        if self.vae_tile_px is not None and self.attention_flops > self.flops / 2:
            line += (
                "; most of it is global attention in the autoencoder, which vae_attention='windowed' "
                "(--attention windowed) avoids"
            )
        return line

    def save(self, path: Path) -> None:
        """Write it whole, or leave the older one. Raises OutputError."""
        with replacing_file(path) as part:
            part.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "MemoryPlan":
        """Read what `save` wrote. Raises JobError if it is damaged."""
        try:
            fields = json.loads(path.read_bytes())
            if fields["tiling"] is not None:
                fields["tiling"] = LatentTiling(**{**fields["tiling"], "tile": tuple(fields["tiling"]["tile"])})
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JobError(f"{path}: the plan cannot be read ({error}); start again without --resume") from error


class Planner:
    """Plans calls of a pipeline's networks, which are counted and not changed.

    Args:
        vae, unet, adapter: of the pipeline, on any device, "meta" included.
        cfw: None plans for w = 0.
        others: networks that stay on the device beside them.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter,
        cfw: ControllableFeatureWrapping | None = None,
        others: Sequence[nn.Module] = (),
    ) -> None:
        networks = [vae, unet, adapter, *([] if cfw is None else [cfw]), *others]
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
        tilings: Iterable[LatentTiling | None],
        steps: int,
        budget_bytes: int,
        *,
        vae_tiles_px: Sequence[int | None],
        mode: TilingMode = "exact",
        window: int | None = None,
        pictures: int = 1,
        branches: int = 1,
        is_limit: bool = True,
        flops_per_second: float = 1e12,
    ) -> MemoryPlan:
        """The first tiles that fit.

        height, width: of the canvas in pixels. tilings, vae_tiles_px: the choices, the best first, None for the whole
        canvas. mode, window: of the autoencoder's tiles; window=None is global attention. pictures: at once.
        branches: 2 with guidance. is_limit: the budget is what was allowed; False means it is what was free, and takes
        the last choice if none fits. flops_per_second: as `measured_rate` gives it.

        Raises:
            ConfigError: even the last choice needs more than the limit.
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = height // factor, width // factor
        available = int(budget_bytes * (1 - RESERVE)) - self.weights

        def sampling(tiling: LatentTiling | None) -> Cost:
            tile, batch_size = (size, 1) if tiling is None else (tiling.tile, tiling.batch_size)
            cost = prediction_cost(self.unet, self.adapter, tile, pictures * batch_size, branches)
            tiles = 1 if tiling is None else len(cover(*size, tile, tiling.overlap))
            return Cost(peak_bytes=cost.peak_bytes, flops=steps * tiles * cost.flops / batch_size)

        def coding(tile_px: int | None) -> Cost:
            if tile_px is None:
                encoding, decoding, kept = whole_coding_costs(self.vae, self.cfw, height, width, pictures)
                peak_bytes = max(encoding.peak_bytes, decoding.peak_bytes, predicting.peak_bytes + kept)
                return Cost(peak_bytes=peak_bytes, flops=encoding.flops + decoding.flops)
            count = coding_costs if mode == "exact" else approximate_coding_costs
            encoding, decoding = count(self.vae, self.cfw, height, width, tile_px, window)
            peak_bytes = max(encoding.peak_bytes, decoding.peak_bytes)
            return Cost(peak_bytes=peak_bytes, flops=pictures * (encoding.flops + decoding.flops))

        def first_that_fits(choices: Iterable[Choice], cost_of: Callable[[Choice], Cost]) -> tuple[Choice, Cost]:
            for choice in choices:
                cost = cost_of(choice)
                if cost.peak_bytes <= available:
                    return choice, cost
            if is_limit:
                raise self._too_little(cost, budget_bytes)
            return choice, cost

        choices = list(tilings)
        tiling, predicting = first_that_fits(choices, sampling)
        vae_tile_px, coded = first_that_fits(vae_tiles_px, coding)
        flops = predicting.flops + coded.flops
        return MemoryPlan(
            tiling=tiling,
            vae_tile_px=vae_tile_px,
            peak_bytes=self.weights + max(predicting.peak_bytes, coded.peak_bytes),
            flops=flops,
            attention_flops=pictures * self._attention_flops(*size) if window is None and mode == "exact" else 0.0,
            seconds=flops / flops_per_second,
            is_reduced=_tile(tiling) != _tile(choices[0]),
            max_memory=budget_bytes if is_limit else None,
        )

    def _attention_flops(self, height: int, width: int) -> float:
        """What global attention in the autoencoder costs more than windows of the usual size."""
        return sum(
            attention_flops(height * width, one.to_k.out_features)
            - attention_flops(height * width, one.to_k.out_features, WINDOW)
            for coder in (self.vae.encoder, self.vae.decoder)
            for one in coder.mid_block.attentions
            if one is not None
        )

    def _too_little(self, cost: Cost, budget_bytes: int) -> ConfigError:
        needed = (cost.peak_bytes + self.weights) / (1 - RESERVE)
        return ConfigError(
            f"{_readable(budget_bytes)} of memory are too little, expected at least {_readable(needed)} for these "
            f"networks and tiles ({_readable(self.weights)} are weights); allow more, take smaller tiles if they are "
            "given, or load the pipeline in half precision"
        )


def free_bytes(device: torch.device) -> int:
    """What the device can still give to this process; memory of the CPU is divided among those launched on it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices, the fastest of five tries."""
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(_seconds(lambda: (matrix @ matrix)[0, 0].item()) for _ in range(5))


def _readable(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"


def _tile(tiling: LatentTiling | None) -> tuple[int, int] | None:
    return None if tiling is None else tiling.tile


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
