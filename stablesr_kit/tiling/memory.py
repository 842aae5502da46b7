"""What fits into a device's memory: the wishes (Tiling), the costs of the networks, and the plan made from both."""

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, get_args

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import convert_file_size_to_int
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stablesr_kit.errors import ConfigError, JobError
from stablesr_kit.imaging.canvas import Canvas, Region
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
    scale_factor,
)
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.storage import replacing_file
from stablesr_kit.tiling.autoencoder import (
    APPROXIMATE_HALO,
    SAMPLED_PATCH,
    SAMPLED_PATCHES,
    VAE_TILES_PX,
    WINDOW,
    AttentionMode,
    PictureCoder,
    TilingMode,
    smallest_tile_px,
)
from stablesr_kit.tiling.feature_maps import FeatureMap, Workspace
from stablesr_kit.tiling.latents import TileGrid, TileSize, choose_grid, cover, grids
from stablesr_kit.tiling.scratch import Moments, Scratch, sums_of
from stablesr_kit.tiling.walk import attention_flops, decoded, encoded

RESERVE = 0.1  # of the budget, for what is not counted: the kernels' own buffers and the allocator's gaps
GIB = 2**30
LARGEST_BATCH = 8
CPU_VAE_TILE_PX = 256  # fastest there: 7.5 s per megapixel of mini, 8.4 with 128, 8.7 with 512, 10.1 with 1024
META = torch.device("meta")

Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How large a picture is worked at, and how a large one is split: tiles, memory, and room on disk.

    Attributes:
        tile_px: side of the tiles in which a large picture is sampled, in pixels of the result. "auto" is the size the
            UNet was trained on, but up to four times that area pictures stay whole; "none" never tiles.
        overlap_px: overlap of neighbouring tiles, in pixels; None is a quarter of a tile.
        batch_size: tiles per call of the networks, on devices where this is faster; None is as many as fit.
        jitter: moves the tiles at every step, so that no border stays in place.
        vae_tile_px: side of the tiles of autoencoder and CFW; it does not change the result. None is what fits, and
            small pictures stay whole.
        vae_mode: "exact" encodes and decodes a tiled picture as if it were whole; "approximate" nearly so, with less
            on disk.
        vae_attention: "global", or "windowed" if global attention, whose cost is quadratic, is too slow.
        max_memory: limit for the device, in bytes or as "6GB"; None is what is free. If it is too little for the tiles
            of "auto", smaller ones are used; this changes the picture, and a warning says so.
        folder: for large feature maps during the call; None is the system's temporary folder.
        working_scale: a result of a smaller scale is made at this one and reduced; 0 works at the scale of the result,
            None at that of the model.

    Raises:
        ConfigError: a value is invalid. Whether it suits the networks is checked in the call.
    """

    tile_px: TileSize = "auto"
    overlap_px: int | None = None
    batch_size: int | None = None
    jitter: bool = False
    vae_tile_px: int | None = None
    vae_mode: TilingMode = "exact"
    vae_attention: AttentionMode = "global"
    max_memory: int | str | None = None
    folder: Path | None = None
    working_scale: float | None = None

    def __post_init__(self) -> None:
        if not (
            self.working_scale is None or (isinstance(self.working_scale, Real) and 0 <= self.working_scale < math.inf)
        ):
            raise ConfigError(f"working_scale={self.working_scale!r} is given, expected 0 (off) or a scale such as 4")
        for name, value, choices in (
            ("vae_mode", self.vae_mode, get_args(TilingMode)),
            ("vae_attention", self.vae_attention, get_args(AttentionMode)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is given, expected one of {choices}")
        for name, number in (("batch_size", self.batch_size), ("vae_tile_px", self.vae_tile_px)):
            if number is not None and (not isinstance(number, Integral) or number < 1):
                raise ConfigError(f"{name}={number!r} is given, expected at least 1")
        self.allowed_bytes()

    def allowed_bytes(self) -> int | None:
        """max_memory in bytes, from a number or a text such as "6GB" (10**9) or "6GiB" (2**30); None is no limit.

        Raises:
            ConfigError: it is neither.
        """
        size = self.max_memory
        try:
            return None if size is None else convert_file_size_to_int(size.upper() if isinstance(size, str) else size)
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"max_memory={size!r} is given, expected bytes or a size such as '6GB' or '6GiB'"
            ) from error

    def working_size(self, lq: tuple[int, int], result: tuple[int, int], of_model: float) -> tuple[int, int]:
        """Height and width that a result is made at. All are (height, width); of_model: the model's working scale."""
        scale = of_model if self.working_scale is None else self.working_scale
        height, width = (max(made, round(scale * given)) for given, made in zip(lq, result, strict=True))
        return height, width

    def grid(
        self, unet: UNet2DConditionModel, height: int, width: int, pixels_per_latent: int, margin: int = 0
    ) -> TileGrid | None:
        """The grid for a canvas of height x width latents if memory does not matter; None samples it whole.

        margin: see `choose_grid`.

        Raises:
            ValueError: a tile or an overlap cannot work.
        """
        batch_size = self.batch_size or 1
        return choose_grid(unet, height, width, pixels_per_latent, self.tile_px, self.overlap_px, batch_size, margin)

    def coder(
        self,
        vae: AutoencoderKL,
        cfw: ControllableFeatureWrapping | None,
        tile_px: int | None,
        progress: Callable[[str, int, str], Any] | None,
    ) -> PictureCoder:
        """The autoencoder and CFW of a call, in this mode and with this folder. Arguments as `PictureCoder`."""
        return PictureCoder(
            vae,
            cfw,
            tile_px=tile_px,
            mode=self.vae_mode,
            attention=self.vae_attention,
            folder=self.folder,
            progress=progress,
        )

    def leaves_choice(self, grid: TileGrid | None, device: torch.device) -> bool:
        """Whether a plan is needed: memory decides something. Without a limit, small pictures are taken whole."""
        is_batch_given = self.batch_size is not None or device.type == "cpu"
        is_decided = grid is None or (is_batch_given and self.vae_tile_px is not None)
        return self.max_memory is not None or not is_decided


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a call will run, and what it needs.

    Attributes:
        grid: of the latents; None samples them whole.
        vae_tile_px: side of the tiles of autoencoder and CFW; None takes the picture whole.
        peak_bytes: peak memory on the device: weights, and the tensors of the largest stage.
        flops: operations of the whole call.
        attention_flops: the part of them by which the autoencoder's global attention exceeds windowed attention.
        seconds: an estimate, from flops and the measured speed of matrix products on the device.
        is_reduced: whether tiles of latents are smaller than wanted for lack of memory. Only this changes the picture.
        max_memory: the limit in bytes; None if it was what was free.
    """

    grid: TileGrid | None
    vae_tile_px: int | None
    peak_bytes: int
    flops: float
    attention_flops: float
    seconds: float
    is_reduced: bool = False
    max_memory: int | None = None

    def __str__(self) -> str:
        latents, picture = "latents as a whole", "autoencoder as a whole"
        if self.grid is not None:
            height, width = self.grid.tile
            latents = f"tiles of {height} x {width} latents, {self.grid.batch_size} at once"
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
                "; most of it is global attention in the autoencoder, which Tiling(vae_attention='windowed') "
                "(--attention windowed) avoids"
            )
        return line

    def save(self, path: Path) -> None:
        """Write it whole, or leave the older one. Raises OutputError."""
        with replacing_file(path) as part:
            part.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote. Raises JobError if it is damaged."""
        try:
            return cls.of_fields(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JobError(f"{path}: the plan cannot be read ({error}); start again without --resume") from error

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> "Plan":
        """The plan that `dataclasses.asdict` made these of."""
        grid = fields["grid"]
        return cls(**{**fields, "grid": grid and TileGrid(**{**grid, "tile": tuple(grid["tile"])})})


class Planner:
    """Plans the calls of a pipeline; the networks are only counted.

    Args:
        vae, unet, adapter: of the pipeline, on any device, also "meta"; adapter=None plans the UNet alone.
        cfw: None plans for w = 0.
        others: other networks that stay on the device.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter | None = None,
        cfw: ControllableFeatureWrapping | None = None,
        others: Sequence[nn.Module] = (),
    ) -> None:
        networks = [vae, unet, *(one for one in (adapter, cfw) if one is not None), *others]
        self.networks = networks
        self.weights = sum(weight_bytes(network) for network in networks)
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        coding_dtype = torch.float32 if upcast else vae.dtype
        if upcast:
            self.weights += weight_bytes(vae) + (0 if cfw is None else weight_bytes(cfw))
        self.vae = without_values(vae, coding_dtype)
        self.cfw = None if cfw is None else without_values(cfw, coding_dtype)
        self.unet = without_values(unet, unet.dtype)
        self.adapter = None if adapter is None else without_values(adapter, adapter.dtype)

    def plan(
        self,
        height: int,
        width: int,
        tiling: Tiling,
        device: torch.device,
        *,
        steps: int,
        pictures: int = 1,
        branches: int = 1,
        flops_per_second: float | None = None,
        margin_px: int = 0,
    ) -> Plan:
        """The plan that fits on a device and keeps to the tiling.

        What the tiling leaves open is chosen: batch size and tiles of the autoencoder, which do not change the picture;
        only if that is not enough, smaller tiles of latents, which do. If nothing fits into the free memory, the
        smallest tiles are tried.

        height, width: of the canvas in pixels. pictures: per call. branches: 2 with guidance. flops_per_second: of the
        device; None measures it. margin_px: of the canvas, on each side.

        Raises:
            ConfigError: even the smallest tiles need more than the tiling's limit.
            ValueError: a tile or an overlap cannot work.
        """
        factor = scale_factor(self.vae)
        size = height // factor, width // factor
        window = WINDOW if tiling.vae_attention == "windowed" else None
        is_exact = tiling.vae_mode == "exact"
        limit = tiling.allowed_bytes()
        budget_bytes = self._usable_bytes(device) if limit is None else limit
        available = int(budget_bytes * (1 - RESERVE)) - self.weights

        def sampling(grid: TileGrid | None) -> Cost:
            tile, batch_size = (size, 1) if grid is None else (grid.tile, grid.batch_size)
            cost = prediction_cost(self.unet, self.adapter, tile, pictures * batch_size, branches)
            tiles = 1 if grid is None else len(cover(*size, tile, grid.overlap))
            return Cost(peak_bytes=cost.peak_bytes, flops=steps * tiles * cost.flops / batch_size)

        def coding(tile_px: int | None) -> Cost:
            if tile_px is None:
                encoding, decoding, kept = whole_coding_costs(self.vae, self.cfw, height, width, pictures)
                peak_bytes = max(encoding.peak_bytes, decoding.peak_bytes, predicting.peak_bytes + kept)
                return Cost(peak_bytes=peak_bytes, flops=encoding.flops + decoding.flops)
            count = coding_costs if is_exact else approximate_coding_costs
            encoding, decoding = count(self.vae, self.cfw, height, width, tile_px, window)
            peak_bytes = max(encoding.peak_bytes, decoding.peak_bytes)
            return Cost(peak_bytes=peak_bytes, flops=pictures * (encoding.flops + decoding.flops))

        def first_that_fits(choices: Iterable[Choice], cost_of: Callable[[Choice], Cost]) -> tuple[Choice, Cost]:
            for choice in choices:
                cost = cost_of(choice)
                if cost.peak_bytes <= available:
                    return choice, cost
            if limit is not None:
                raise self._too_little(cost, budget_bytes)
            return choice, cost

        batch_size = tiling.batch_size or (1 if device.type == "cpu" else LARGEST_BATCH)
        choices = list(
            grids(self.unet, *size, factor, tiling.tile_px, tiling.overlap_px, batch_size, margin_px // factor)
        )
        grid, predicting = first_that_fits(choices, sampling)
        vae_tile_px, coded = first_that_fits(self._vae_tiles_px(tiling, device, choices[0] is None), coding)
        flops = predicting.flops + coded.flops
        return Plan(
            grid=grid,
            vae_tile_px=vae_tile_px,
            peak_bytes=self.weights + max(predicting.peak_bytes, coded.peak_bytes),
            flops=flops,
            attention_flops=pictures * self._attention_flops(*size) if window is None and is_exact else 0.0,
            seconds=flops / (flops_per_second or measured_rate(device, self.unet.dtype)),
            is_reduced=_tile(grid) != _tile(choices[0]),
            max_memory=limit,
        )

    def _usable_bytes(self, device: torch.device) -> int:
        """Bytes free on the device, plus those that the networks already take there."""
        held = [one for one in self.networks if next(one.parameters()).device == device]
        return free_bytes(device) + sum(weight_bytes(network) for network in held)

    def _vae_tiles_px(self, tiling: Tiling, device: torch.device, is_whole: bool) -> list[int | None]:
        """Tile sides for the autoencoder, the best first. is_whole: whether latents are sampled whole."""
        if tiling.vae_tile_px is not None:
            return [tiling.vae_tile_px]
        # The approximate mode's halos make tiles of 256 px compute 1.8 times the picture, of 512 px 1.3 times.
        largest = CPU_VAE_TILE_PX if device.type == "cpu" and tiling.vae_mode == "exact" else VAE_TILES_PX[0]
        smallest = smallest_tile_px(self.vae, tiling.vae_mode)
        return [None] * is_whole + [px for px in VAE_TILES_PX if smallest <= px <= largest]

    def _attention_flops(self, height: int, width: int) -> float:
        """Operations by which the autoencoder's global attention exceeds windowed attention of the usual size."""
        return sum(
            attention_flops(height * width, one.to_k.out_features)
            - attention_flops(height * width, one.to_k.out_features, WINDOW)
            for coder in (self.vae.encoder, self.vae.decoder)
            for one in coder.mid_block.attentions
            if one is not None
        )

    def _too_little(self, cost: "Cost", budget_bytes: int) -> ConfigError:
        needed = (cost.peak_bytes + self.weights) / (1 - RESERVE)
        return ConfigError(
            f"{_readable(budget_bytes)} of memory are too little, expected at least {_readable(needed)} for these "
            f"networks and tiles ({_readable(self.weights)} are weights); allow more, take smaller tiles if they are "
            "given, or load the pipeline in half precision"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still get on the device; processes launched together share the CPU's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices, the fastest of five."""
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(_seconds(lambda: (matrix @ matrix)[0, 0].item()) for _ in range(5))


def _readable(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"


def _tile(grid: TileGrid | None) -> tuple[int, int] | None:
    return None if grid is None else grid.tile


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Cost:
    """peak_bytes: of tensors alive at once, without weights and workspaces of kernels. flops: operations."""

    peak_bytes: int
    flops: float


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of tensors made in it and still alive; `peak` is the maximum."""

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
    """A network of the same config on the meta device, which computes only shapes."""
    kind = type(getattr(network, "_orig_mod", network))  # of what torch.compile wraps
    with META:
        built: ModelMixin = kind.from_config(network.config)
    return nn.Module.to(built, dtype).eval()


def weight_bytes(network: nn.Module) -> int:
    """Size of its parameters and buffers; of quantised ones, of what they are stored as."""
    return sum(_stored_bytes(one) for one in (*network.parameters(), *network.buffers()))


def _stored_bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol for tensors that are made of others
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def prediction_cost(
    unet: UNet2DConditionModel,
    adapter: StableSRAdapter | None,
    tile: tuple[int, int],
    batch_size: int,
    branches: int = 1,
) -> Cost:
    """Cost of one prediction for a batch of tiles of latents; the networks are on the meta device.

    branches: 2 with guidance. Attention is counted as fused, as torch computes it on CPUs and GPUs.
    """
    latents = torch.empty(batch_size, unet.config.in_channels, *tile, dtype=unet.dtype, device=META)
    prompts = torch.empty(branches * batch_size, 77, unet.config.cross_attention_dim, dtype=unet.dtype, device=META)
    if adapter is None:
        return _counted(lambda: unet(latents, 500, prompts))
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
    """Costs of encoding and of decoding a picture of height x width pixels in exact tiles; networks on the meta device.

    cfw: None counts the plain decode. window: as `TiledAutoencoder`; None is global attention.
    """
    factor = scale_factor(vae)
    levels = tuple(cfw.config.levels) if cfw is not None else ()
    image = Canvas(vae.config.in_channels, height, width, device=META)
    z = Canvas(vae.config.latent_channels, height // factor, width // factor, device=META)
    tile_values = tile_px**2 * vae.config.block_out_channels[0]
    encoding, decoding = (_CostingWorkspace(tile_values=tile_values) for _ in range(2))
    _, features = encoded(vae, image, levels, encoding, window)
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
    factor = scale_factor(vae)
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
    """As `coding_costs` without tiles, for a batch of pictures; and the bytes of CFW's features, kept between both."""
    factor = scale_factor(vae)
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
    """Attention that never stores its scores, like the kernels of real devices; on "meta" torch would take another."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        return fused(given["query"], given["key"], given["value"])[0]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(kw_only=True)
class _CostingWorkspace(Workspace):
    """Computes one tile in the middle of each map, without values; all others cost as much per position."""

    device: torch.device = META
    scratch: Scratch = field(default_factory=lambda: Scratch(device=META))
    cost: Cost = Cost(peak_bytes=0, flops=0)

    def _sweep(self, x: FeatureMap, _canvas: Canvas | None, side: int | None, with_moments: bool) -> torch.dtype:
        channels, height, width = x.shape
        side = side or self.side(channels)
        (top, bottom), (left, right) = _middle(height, side), _middle(width, side)
        region = Region(top, left, bottom, right)
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
        x.moments = Moments.of_zeros(channels)
        return dtypes[0]


def _middle(length: int, side: int) -> tuple[int, int]:
    start = max(length - side, 0) // 2 // 2 * 2
    return start, min(start + side, length)
