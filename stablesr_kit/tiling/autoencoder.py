"""Encode and decode pictures of any size in tiles: exactly, or approximately with less work."""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from tqdm import tqdm

from stablesr_kit.errors import ConfigError, is_out_of_memory
from stablesr_kit.imaging.canvas import Canvas, Part, Readable, Region, View, assembled, regions
from stablesr_kit.models.execution import execution_device, in_float32, in_use
from stablesr_kit.models.feature_wrapping import (
    RRDB,
    ControllableFeatureWrapping,
    Kept,
    after_each,
    decode_with_features,
    encode_with_features,
    is_compiled,
    scale_factor,
)
from stablesr_kit.tiling.feature_maps import CountingWorkspace, Workspace
from stablesr_kit.tiling.scratch import Record, Scratch
from stablesr_kit.tiling.walk import decoded, encoded

TilingMode = Literal["exact", "approximate"]
AttentionMode = Literal["global", "windowed"]
Features = dict[int, Tensor] | dict[int, Canvas]
Coded = TypeVar("Coded")
Statistics = dict[nn.GroupNorm, tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)

VAE_TILES_PX = (512, 256, 128, 64)
MAX_BYTES_IN_MEMORY = 2**29
APPROXIMATE_HALO = 8  # latent positions; the true receptive field is about twice that, its far taps are weak
WINDOW = 64  # latent positions
SAMPLED_PATCHES = 8  # per side of the picture
SAMPLED_PATCH = 32  # latent positions


class PictureCoder:
    """The autoencoder and CFW of a call: whole pictures while memory suffices, else tile by tile.

    Networks in float16 run in float32 if the autoencoder's config asks for it (`force_upcast`).

    Args:
        vae, cfw, mode, attention: as `TiledAutoencoder`.
        tile_px: side of a tile; None begins with whole pictures. Lack of memory sets it, and then halves it.
        folder: for feature maps of more than half a gigabyte, in unnamed files; None is the system's temporary
            folder.
        progress: (title, number of parts, name of a part) -> a progress bar; None shows none. Parts are tiles, or the
            networks' blocks for whole pictures.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        cfw: ControllableFeatureWrapping | None = None,
        *,
        tile_px: int | None = None,
        mode: TilingMode = "exact",
        attention: AttentionMode = "global",
        folder: Path | None = None,
        progress: "Callable[[str, int, str], tqdm[Any]] | None" = None,
    ) -> None:
        self.vae = vae
        self.cfw = cfw
        self.tile_px = tile_px
        self.mode = mode
        self.attention = attention
        self.folder = folder
        self.progress = progress

    @torch.no_grad()
    def encode(
        self, images: Sequence[Readable], levels: tuple[int, ...], record: Path | None = None
    ) -> tuple[Tensor, list[Features]]:
        """Moments (B, 2 C, h, w) of the raw codes' posteriors, and the encoder's features at `levels`.

        images: B of them, (3, H, W) in [-1, 1]. The features are dicts level -> (b, C, h, w), one for
        all pictures or one per picture. record: as in `TiledAutoencoder.encode_with_features`.
        """
        with self._in_safe_precision():
            whole = self._if_memory_suffices("encoding", len(images), lambda: self._encode_whole(images, levels))
            if whole is not None:
                return whole
            coded = [self._encode_tiled(one, levels, _part(record, "encode", i)) for i, one in enumerate(images)]
        return torch.cat([moments.to_tensor() for moments, _ in coded]), [features for _, features in coded]

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        features: list[Features],
        w: float,
        record: Path | None = None,
        kept: dict[int, Kept] | None = None,
    ) -> list[Readable]:
        """Images (3, H, W), about [-1, 1], of raw codes z (B, C, h, w); features as `encode` returns them, or empty.

        B is a multiple of the number of encoded pictures: the codes of each follow one another. kept: as in
        `decode_with_features`, of pictures that are taken whole.
        """
        with self._in_safe_precision():
            fused = self.cfw if w > 0 else None
            whole = self._if_memory_suffices(
                "decoding", len(z), lambda: self._decode_whole(z, cast(Any, features[0]), w, kept), fused
            )
            if whole is not None:
                return [View(one) for one in whole.float().split(1)]
            of_pictures = [canvases for one in features for canvases in _by_picture(one)]
            copies = len(z) // len(of_pictures)
            return [
                self._decode_tiled(View(one), of_pictures[i // copies] or None, w, _part(record, "decode", i))
                for i, one in enumerate(z.split(1))
            ]

    def _encode_whole(self, images: Sequence[Readable], levels: tuple[int, ...]) -> tuple[Tensor, list[Features]]:
        image = torch.cat([assembled(one) for one in images]).to(execution_device(self.vae), self.vae.dtype)
        posterior, features = encode_with_features(self.vae, image, levels)
        return posterior.parameters, [features]

    def _decode_whole(self, z: Tensor, features: dict[int, Tensor], w: float, kept: dict[int, Kept] | None) -> Tensor:
        z = z.to(execution_device(self.vae), self.vae.dtype)
        if w == 0 or self.cfw is None:
            return self.vae.decode(z, return_dict=False)[0]
        copies = len(z) // len(next(iter(features.values())))
        features = {level: maps.repeat_interleave(copies, dim=0) for level, maps in features.items()}
        return decode_with_features(self.vae, self.cfw, z, features, w, kept)

    def _encode_tiled(
        self, image: Readable, levels: tuple[int, ...], record: Path | None
    ) -> tuple[Canvas, dict[int, Canvas]]:
        return self._in_tiles(
            image.shape[1:],
            "encoding",
            lambda tiled: tiled.encoding_tiles(image, levels),
            lambda tiled: tiled.encode_with_features(image, levels, record),
        )

    def _decode_tiled(
        self, z: Readable, features: Mapping[int, Readable] | None, w: float, record: Path | None
    ) -> Canvas:
        factor = scale_factor(self.vae)
        return self._in_tiles(
            (z.shape[1] * factor, z.shape[2] * factor),
            "decoding",
            lambda tiled: tiled.decoding_tiles(z, features, w),
            lambda tiled: tiled.decode(z, features, w, record),
        )

    def _if_memory_suffices(
        self,
        doing: Literal["encoding", "decoding"],
        pictures: int,
        code: Callable[[], Coded],
        cfw: ControllableFeatureWrapping | None = None,
    ) -> Coded | None:
        """The result of `code` on whole pictures; None if tiles are needed."""
        if self.tile_px is not None:
            return None
        try:
            with self._bar_over_blocks(doing, pictures, cfw):
                return code()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("not enough memory for the autoencoder on the whole picture; going on in tiles")
        self.tile_px = VAE_TILES_PX[0]
        _empty_cache()
        return None

    @contextmanager
    def _bar_over_blocks(
        self, doing: Literal["encoding", "decoding"], pictures: int, cfw: ControllableFeatureWrapping | None
    ) -> Iterator[None]:
        """Shows how many blocks have run; with a compiled autoencoder only the end is seen."""
        if self.progress is None:
            yield
            return
        coder = self.vae.encoder if doing == "encoding" else self.vae.decoder
        networks = (coder,) if cfw is None else (coder, cfw)
        blocks = [one for network in networks for one in network.modules() if isinstance(one, ResnetBlock2D | RRDB)]
        total = len(blocks) * (pictures if self.vae.use_slicing else 1)
        with self.progress(doing, total, "block") as bar:

            def show(_block: nn.Module, _output: Tensor) -> None:
                bar.update()

            hidden = any(is_compiled(one) for one in (self.vae.encode, self.vae.decode, *self.vae.modules()))
            with nullcontext() if hidden else after_each(blocks, show):
                yield
            bar.update(total - bar.n)

    def _in_tiles(
        self,
        size: tuple[int, int],
        doing: str,
        count: Callable[["TiledAutoencoder"], int],
        code: Callable[["TiledAutoencoder"], Coded],
    ) -> Coded:
        """The result of `code` in tiles; if memory runs out it starts again with tiles of half the side."""
        assert self.tile_px is not None
        nbytes = size[0] * size[1] * self.vae.config.block_out_channels[0] * 4
        folder = (self.folder or Path(tempfile.gettempdir())) if nbytes > MAX_BYTES_IN_MEMORY else None
        tiled = TiledAutoencoder(
            self.vae, self.cfw, tile_px=self.tile_px, mode=self.mode, attention=self.attention, folder=folder
        )
        while True:
            try:
                if self.progress is None:
                    return code(tiled)
                with self.progress(doing, count(tiled), "tile") as bar:
                    tiled.on_tiles = bar.update
                    return code(tiled)
            except (RuntimeError, MemoryError) as error:
                half = tiled.tile_px // 2
                if half < smallest_tile_px(self.vae, self.mode) or not is_out_of_memory(error):
                    raise
                logger.warning("not enough memory for tiles of %d pixels; going on with %d", tiled.tile_px, half)
                self.tile_px = tiled.tile_px = half
            _empty_cache()

    def _in_safe_precision(self) -> AbstractContextManager[None]:
        parts = [part for part in (self.vae, self.cfw) if part is not None]
        return in_float32(*parts) if self.vae.config.force_upcast else nullcontext()


def coding_bars(config: Mapping[str, Any]) -> "Callable[[str, int, str], tqdm[Any]] | None":
    """The `progress` of a `PictureCoder` for the configuration of a pipeline's progress bars."""

    def bar(doing: str, total: int, unit: str) -> "tqdm[Any]":
        description = f"{config['desc']}, {doing}" if config.get("desc") else doing
        return tqdm(total=total, **{"unit": unit, **config, "desc": description})

    return None if config.get("disable") else bar


class TiledAutoencoder:
    """Runs a stock AutoencoderKL, and CFW if given, over tiles. The networks are not changed.

    mode "exact" goes layer by layer: convolutions see their true neighbours, group norms use statistics of the whole
    picture, and attention sees all of it. In float32 the result differs from the untiled one by less than 1e-4. Only
    tiles are on the device; feature maps are on canvases.

    mode "approximate" takes each tile through all layers at once. Group norms use statistics of 8 x 8 patches
    spread over the picture, tiles have a margin of 8 latent positions that is cut off, and attention sees one tile.
    Only the feature maps that CFW needs are stored.

    Args:
        vae: the autoencoder.
        cfw: the fusion layers for it; None allows w = 0 only.
        tile_px: side of a tile in pixels; in exact mode deeper layers use tiles with the same number of values.
        mode: "exact" or "approximate".
        attention: of the exact mode: "global", or "windowed" where global attention, whose cost is quadratic, is too
            slow.
        window: side, in latent positions, of the square that windowed attention sees.
        folder: for the canvases; None keeps them in memory.
        canvas_dtype: of the canvases of feature maps; half precision takes half the room and is less exact.

    Raises:
        ConfigError: an option is invalid, or the autoencoder has other blocks than the stock one.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        cfw: ControllableFeatureWrapping | None = None,
        *,
        tile_px: int = 256,
        mode: TilingMode = "exact",
        attention: AttentionMode = "global",
        window: int = WINDOW,
        folder: Path | None = None,
        canvas_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_blocks(vae)
        factor = scale_factor(vae)
        if mode not in get_args(TilingMode):
            raise ConfigError(f"mode={mode!r} is given, expected one of {get_args(TilingMode)}")
        if attention not in get_args(AttentionMode):
            raise ConfigError(f"attention={attention!r} is given, expected one of {get_args(AttentionMode)}")
        if tile_px < factor:
            raise ConfigError(f"tile_px={tile_px} is smaller than one latent position; give at least {factor}")
        if mode == "approximate" and tile_px <= 2 * APPROXIMATE_HALO * factor:
            raise ConfigError(
                f"tile_px={tile_px} leaves nothing between the halos of the approximate mode; "
                f"give at least {smallest_tile_px(vae, mode)}"
            )
        if window < 4:
            raise ConfigError(f"window={window} is given, expected at least 4 latent positions")
        self.vae = vae
        self.cfw = cfw
        self.tile_px = tile_px
        self.mode = mode
        self.window = window if attention == "windowed" else None
        self.folder = folder
        self.canvas_dtype = canvas_dtype
        self.factor = factor
        self.on_tiles: Callable[[int], object] = lambda _: None
        """Called with the number of tiles done since the last call; see `encoding_tiles`."""

    def encode(self, image: Readable | Tensor) -> Canvas:
        """Moments (2 C, h, w) of the raw code's posterior: mean, then log variance.

        image: (3, H, W) in [-1, 1]: a canvas, anything that reads like one, or a tensor (1, 3, H, W). Sides that are
        no multiples of the autoencoder's factor lose the remainder, as in the stock autoencoder.
        """
        return self.encode_with_features(image, ())[0]

    @torch.no_grad()
    def encode_with_features(
        self, image: Readable | Tensor, levels: tuple[int, ...], record: Path | None = None
    ) -> tuple[Canvas, dict[int, Canvas]]:
        """Moments as from `encode`, and canvases of the encoder's features (C, H / 2**level, W / 2**level).

        record: folder for the canvases and the progress; after a kill, the same call continues there, with the same
            bits. None records nothing.
        """
        image = View(image) if isinstance(image, Tensor) else image
        self._check_image(image, levels)
        scratch = self._scratch(record, (*image.shape, *levels))
        with in_use(self.vae):
            if self.mode == "exact":
                return encoded(self.vae, image, levels, self._workspace(scratch), self.window)
            return self._encoded_nearly(image, levels, scratch)

    @torch.no_grad()
    def decode(
        self,
        z: Readable | Tensor,
        features: Mapping[int, Readable] | None = None,
        w: float = 0.0,
        record: Path | None = None,
    ) -> Canvas:
        """Image (3, H, W), about [-1, 1], of the raw code z (C, h, w), with the LQ picture's features wrapped in.

        z: a canvas, anything that reads like one, or a tensor (1, C, h, w).
        features: from `encode_with_features` at the levels of CFW; not changed. None if w is 0.
        w: 0 is the plain decode, 1 what CFW was trained for.
        record: as in `encode_with_features`.
        """
        z = View(z) if isinstance(z, Tensor) else z
        fused = self._features_for(z, features, w)
        cfw = self.cfw if fused else None
        scratch = self._scratch(record, (*z.shape, w))
        with in_use(self.vae), nullcontext() if cfw is None else in_use(cfw):
            if self.mode == "exact":
                return decoded(self.vae, cfw, z, fused, w, self._workspace(scratch), self.window)
            return self._decoded_nearly(cfw, z, fused, w, scratch)

    @torch.no_grad()
    def encoding_tiles(self, image: Readable, levels: tuple[int, ...]) -> int:
        """How many tiles `encode_with_features` computes."""
        counting = self._counting()
        if self.mode == "exact":
            encoded(self.vae, image, levels, counting, self.window)
            return counting.tiles
        height, width = (side // self.factor for side in image.shape[1:])
        encoded(self.vae, _sampled(image, height, width, self.factor), levels, counting, self.window)
        return counting.tiles + len(self._tiles(height, width))

    @torch.no_grad()
    def decoding_tiles(self, z: Readable, features: Mapping[int, Readable] | None, w: float) -> int:
        """How many tiles `decode` computes."""
        fused = self._features_for(z, features, w)
        cfw = self.cfw if fused else None
        counting = self._counting()
        if self.mode == "exact":
            decoded(self.vae, cfw, z, fused, w, counting, self.window)
            return counting.tiles
        _, height, width = z.shape
        samples = {level: _sampled(maps, height, width, self.factor >> level) for level, maps in fused.items()}
        decoded(self.vae, cfw, _sampled(z, height, width, 1), samples, w, counting, self.window)
        return counting.tiles + len(self._tiles(height, width))

    def _encoded_nearly(
        self, image: Readable, levels: tuple[int, ...], scratch: Scratch
    ) -> tuple[Canvas, dict[int, Canvas]]:
        _, image_height, image_width = image.shape
        height, width = image_height // self.factor, image_width // self.factor
        sample = _sampled(image, height, width, self.factor)
        sampling = self._workspace(scratch)
        encoded(self.vae, sample, levels, sampling, self.window)
        channels = self.vae.config.block_out_channels
        moments = scratch.canvas((2 * self.vae.config.latent_channels, height, width), self.canvas_dtype)
        features = {
            i: scratch.canvas((channels[i], image_height >> i, image_width >> i), self.canvas_dtype) for i in levels
        }
        sweep = scratch.begin()
        for inner, outer in self._tiles(height, width)[sweep.done :]:
            tile = Part(image, _scaled(outer, self.factor, moments, image))
            codes, maps = encoded(self.vae, tile, levels, self._tile_workspace(sampling.statistics), None)
            moments.write(inner, inner.cut_from(codes.to_tensor(), outer))
            for level, canvas in features.items():
                scale = self.factor >> level
                inner_part, outer_part = (_scaled(part, scale, moments, canvas) for part in (inner, outer))
                canvas.write(inner_part, inner_part.cut_from(maps[level].to_tensor(), outer_part))
            sweep.done += 1
            scratch.save()
        return moments, features

    def _decoded_nearly(
        self,
        cfw: ControllableFeatureWrapping | None,
        z: Readable,
        fused: dict[int, Readable],
        w: float,
        scratch: Scratch,
    ) -> Canvas:
        _, height, width = z.shape
        sample = _sampled(z, height, width, 1)
        samples = {level: _sampled(maps, height, width, self.factor >> level) for level, maps in fused.items()}
        sampling = self._workspace(scratch)
        decoded(self.vae, cfw, sample, samples, w, sampling, self.window)
        image = scratch.canvas(
            (self.vae.config.out_channels, height * self.factor, width * self.factor), self.canvas_dtype
        )
        sweep = scratch.begin()
        for inner, outer in self._tiles(height, width)[sweep.done :]:
            parts = {i: Part(maps, _scaled(outer, self.factor >> i, z, maps)) for i, maps in fused.items()}
            workspace = self._tile_workspace(sampling.statistics)
            tile = decoded(self.vae, cfw, Part(z, outer), parts, w, workspace, None).to_tensor()
            inner_px, outer_px = (_scaled(part, self.factor, z, image) for part in (inner, outer))
            image.write(inner_px, inner_px.cut_from(tile, outer_px))
            sweep.done += 1
            scratch.save()
        return image

    def _tiles(self, height: int, width: int) -> list[tuple[Region, Region]]:
        """Latent regions without and with their halo; with the halo their side is tile_px."""
        side = self.tile_px // self.factor - 2 * APPROXIMATE_HALO
        return [(part, part.grown(APPROXIMATE_HALO, height, width)) for part in regions(height, width, side)]

    def _scratch(self, record: Path | None, shapes: tuple[float, ...]) -> Scratch:
        if record is None:
            return Scratch(self.folder, self.on_tiles)
        made_with = {
            "shapes": shapes,
            "tile_px": self.tile_px,
            "mode": self.mode,
            "window": self.window,
            "canvas_dtype": self.canvas_dtype,
        }
        return Record(record, made_with, self.on_tiles)

    def _counting(self) -> CountingWorkspace:
        whole = self._workspace(Scratch())
        return CountingWorkspace(device=whole.device, tile_values=whole.tile_values)

    def _workspace(self, scratch: Scratch) -> Workspace:
        """The workspace of a whole picture."""
        return Workspace(
            device=execution_device(self.vae),
            tile_values=self.tile_px**2 * self.vae.config.block_out_channels[0],
            canvas_dtype=self.canvas_dtype,
            scratch=scratch,
        )

    def _tile_workspace(self, statistics: Statistics) -> Workspace:
        """The workspace of a tile in approximate mode, held in memory as one piece."""
        return Workspace(
            device=execution_device(self.vae),
            tile_values=sys.maxsize,
            canvas_dtype=self.vae.dtype,
            statistics=statistics,
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

    def _features_for(self, z: Readable, features: Mapping[int, Readable] | None, w: float) -> dict[int, Readable]:
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


def smallest_tile_px(vae: AutoencoderKL, mode: TilingMode) -> int:
    """Side of the smallest useful tiles: smaller ones are nearly all halo."""
    return max(64, 4 * APPROXIMATE_HALO * scale_factor(vae) if mode == "approximate" else scale_factor(vae))


def _scaled(region: Region, scale: int, latent: Readable, scaled: Readable) -> Region:
    """A region of a latent-sized canvas, on a canvas `scale` times larger that may have a few more positions."""
    _, height, width = latent.shape
    return Region(
        region.top * scale,
        region.left * scale,
        scaled.shape[1] if region.bottom == height else region.bottom * scale,
        scaled.shape[2] if region.right == width else region.right * scale,
    )


def _sampled(whole: Readable, height: int, width: int, scale: int) -> Canvas:
    """Patches spread over a canvas of height x width latent positions, side by side; all of a small canvas."""
    rows = [
        torch.cat(
            [whole.read(Region(top, left, bottom, right)) for left, right in _patches(width, scale, whole.shape[2])],
            dim=3,
        )
        for top, bottom in _patches(height, scale, whole.shape[1])
    ]
    return Canvas.from_tensor(torch.cat(rows, dim=2))


def _patches(length: int, scale: int, end: int) -> list[tuple[int, int]]:
    """Ends of evenly spaced patches along a side of `end` values: `length` latent positions and a remainder."""
    if length <= SAMPLED_PATCHES * SAMPLED_PATCH:
        return [(0, end)]
    last = length - SAMPLED_PATCH
    starts = [i * last // (SAMPLED_PATCHES - 1) * scale for i in range(SAMPLED_PATCHES)]
    return [(start, start + SAMPLED_PATCH * scale) for start in starts]


def _part(record: Path | None, name: str, index: int) -> Path | None:
    return None if record is None else record / f"{name}-{index}"


def _by_picture(features: Features) -> list[Mapping[int, Readable]]:
    """Features of a batch as one dict of canvases per picture; without features one empty dict."""
    if any(isinstance(maps, Canvas) for maps in features.values()):
        return [cast(Mapping[int, Readable], features)]
    tensors = cast(dict[int, Tensor], features)
    pictures = max((len(maps) for maps in tensors.values()), default=1)
    return [
        {level: Canvas.from_tensor(maps[i : i + 1].float().cpu()) for level, maps in tensors.items()}
        for i in range(pictures)
    ]


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_blocks(vae: AutoencoderKL) -> None:
    """Refuse blocks that the walk through the layers cannot tile."""
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
