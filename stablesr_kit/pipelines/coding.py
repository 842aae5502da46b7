"""Pictures to latents and back: sizes, autoencoder, CFW."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stablesr_kit.imaging.canvas import Canvas, Readable, View, assembled, bands
from stablesr_kit.imaging.neutral import neutral_like
from stablesr_kit.imaging.padding import Padded
from stablesr_kit.imaging.resizing import resized
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.pipelines.pictures import to_pil
from stablesr_kit.spaces import from_latent, to_latent
from stablesr_kit.tiling.autoencoder import AttentionMode, TiledAutoencoder, TilingMode, smallest_tile_px
from stablesr_kit.tiling.memory import is_out_of_memory
from stablesr_kit.tiling.planner import VAE_TILES_PX

logger = logging.getLogger(__name__)

MAX_BYTES_IN_MEMORY = 2**29

Coded = TypeVar("Coded")
Features = dict[int, Tensor] | dict[int, Canvas]
PostStage = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | list[torch.Generator] | None


class ImageCoding(DiffusionPipeline):
    """The steps of a call that size, encode and decode pictures."""

    def upsample(
        self, image: Readable, scale: float | None = None, height: int | None = None, width: int | None = None
    ) -> Readable:
        """The image resized bicubically to the result's size: scale times its own (default 4), or height x width."""
        if height is None or width is None:
            height, width = scaled_size(image.shape[1], image.shape[2], scale)
        return resized(image, height, width)

    def pad(self, image: Readable) -> Readable:
        """The image continued by reflection to its `padded_size`."""
        return Padded(image, *self.padded_size(*image.shape[1:]))

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas for a result of height x width: every level of the networks halves them.

        At least two positions per side are left at the deepest level: group norms have nothing to measure on one.
        """
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        smallest = max(self.config.min_size_px, 2 * multiple)
        padded_height, padded_width = (math.ceil(max(side, smallest) / multiple) * multiple for side in (height, width))
        return padded_height, padded_width

    def prepare_autoencoder(
        self,
        height: int,
        width: int,
        tile_px: int,
        mode: TilingMode = "exact",
        attention: AttentionMode = "global",
        canvas_folder: Path | None = None,
    ) -> TiledAutoencoder:
        """The autoencoder and CFW for pictures of height x width pixels, tile by tile, as `TiledAutoencoder` says.

        canvas_folder: feature maps of more than half a gigabyte lie in a file without a name there; None is the
            system's temporary folder.
        """
        nbytes = height * width * self.vae.config.block_out_channels[0] * 4
        folder = (canvas_folder or Path(tempfile.gettempdir())) if nbytes > MAX_BYTES_IN_MEMORY else None
        return TiledAutoencoder(self.vae, self.cfw, tile_px=tile_px, mode=mode, attention=attention, folder=folder)

    def encode_image(
        self,
        images: Sequence[Readable],
        generator: Generators = None,
        with_features: bool = True,
        num_images_per_prompt: int = 1,
        autoencoder: TiledAutoencoder | None = None,
        record: Path | None = None,
    ) -> tuple[Tensor, list[Features]]:
        """LQ latents (B * num_images_per_prompt, C, h, w), samples of the posterior, and the features CFW needs.

        images: B of them, (3, H, W) in [-1, 1], H and W as `pad` makes them. The features, level -> (b, C, h, w), are
        the encoder's, of all pictures at once or picture by picture; none without cfw or on request.
        autoencoder: encodes tile by tile; None on the device as a whole.
        record: of the tiles, see `TiledAutoencoder.encode_with_features`.
        """
        levels = tuple(self.cfw.config.levels) if with_features and self.cfw is not None else ()
        features: list[Features]
        with self._vae_in_safe_precision():
            whole = None if autoencoder is not None else if_memory_suffices(lambda: self._encode(images, levels))
            if whole is not None:
                moments, features = whole[0].parameters, [whole[1]]
            else:
                autoencoder = autoencoder or self.prepare_autoencoder(*images[0].shape[1:], VAE_TILES_PX[0])
                coded = [
                    self._encoded_in_tiles(autoencoder, one, levels, _numbered(record, "encode", i))
                    for i, one in enumerate(images)
                ]
                moments = torch.cat([canvas.to_tensor() for canvas, _ in coded])
                if generator is not None:  # it may only draw on the device
                    moments = moments.to(self._execution_device)
                features = [canvases for _, canvases in coded]
            z = DiagonalGaussianDistribution(moments.repeat_interleave(num_images_per_prompt, dim=0)).sample(generator)
        return to_latent(z, self.vae).to(self.unet.dtype), features

    def decode_latents(
        self,
        latents: Tensor,
        features: list[Features],
        w: float,
        autoencoder: TiledAutoencoder | None = None,
        record: Path | None = None,
    ) -> list[Readable]:
        """Images (3, H, W), about [-1, 1], of latents (B, C, h, w); the other arguments as `encode_image`.

        Raises:
            FloatingPointError: the UNet or the decoder overflowed.
        """
        images: list[Readable]
        with self._vae_in_safe_precision():
            z = from_latent(latents, self.vae)
            is_whole = autoencoder is None and not any(isinstance(one, Canvas) for one in features[0].values())
            whole = if_memory_suffices(lambda: self._decode(z, cast(Any, features[0]), w)) if is_whole else None
            if whole is not None:
                images = [View(one) for one in whole.float().split(1)]
            else:
                if is_whole:
                    features = _by_picture(cast(Any, features[0]))
                height, width = (side * self.vae_scale_factor for side in z.shape[-2:])
                autoencoder = autoencoder or self.prepare_autoencoder(height, width, VAE_TILES_PX[0])
                copies = len(z) // len(features)
                images = [
                    self._decoded_in_tiles(
                        autoencoder,
                        View(one),
                        cast(Any, features[i // copies]) or None,
                        w,
                        _numbered(record, "decode", i),
                    )
                    for i, one in enumerate(z.split(1))
                ]
        if not all(torch.isfinite(image.read(band)).all() for image in images for band in bands(image)):
            raise FloatingPointError(
                f"the restored picture is not finite, computed in {self.unet.dtype} and decoded in {self.vae.dtype}; "
                "load the pipeline in bfloat16 or float32"
            )
        return images

    def _encoded_in_tiles(
        self, autoencoder: TiledAutoencoder, image: Readable, levels: tuple[int, ...], record: Path | None
    ) -> tuple[Canvas, dict[int, Canvas]]:
        def encode() -> tuple[Canvas, dict[int, Canvas]]:
            with self._tile_bar("encoding", autoencoder, lambda: autoencoder.encoding_tiles(image, levels)):
                return autoencoder.encode_with_features(image, levels, record)

        return in_memory(autoencoder, encode)

    def _decoded_in_tiles(
        self,
        autoencoder: TiledAutoencoder,
        z: Readable,
        features: dict[int, Readable] | None,
        w: float,
        record: Path | None,
    ) -> Canvas:
        def decode() -> Canvas:
            with self._tile_bar("decoding", autoencoder, lambda: autoencoder.decoding_tiles(z, features, w)):
                return autoencoder.decode(z, features, w, record)

        return in_memory(autoencoder, decode)

    @contextmanager
    def _tile_bar(self, doing: str, autoencoder: TiledAutoencoder, count: Callable[[], int]) -> Iterator[None]:
        """A bar over the autoencoder's tiles, configured as the pipeline's others; counted only if it is shown."""
        config = getattr(self, "_progress_bar_config", {})
        if config.get("disable"):
            yield
            return
        description = f"{config['desc']}, {doing}" if config.get("desc") else doing
        with tqdm(total=count(), **{"unit": "tile", **config, "desc": description}) as bar:
            autoencoder.on_tiles = bar.update
            yield

    def finish(
        self, restored: list[Readable], given: list[Readable], post_stages: Sequence[PostStage], output_type: str
    ) -> list[Image.Image] | list[Readable] | np.ndarray | Tensor:
        """Restored images (3, H, W) as an output type says, after the post-stages, which take them whole.

        What is made of a grey picture is grey, see `imaging.neutral`.

        given: the LQ images (3, h, w), one per restored one.
        """
        if post_stages:
            whole, lq = (torch.cat([assembled(one) for one in images]) for images in (restored, given))
            for stage in post_stages:
                whole = stage(whole, lq)
            restored = [View(one) for one in whole.split(1)]
        restored = [neutral_like(*pair) for pair in zip(restored, given, strict=True)]
        if output_type == "canvas":
            return restored
        if output_type == "pil":
            return [to_pil(one) for one in restored]
        return self.image_processor.postprocess(
            torch.cat([assembled(one) for one in restored]), output_type=output_type
        )

    def _encode(
        self, images: Sequence[Readable], levels: tuple[int, ...]
    ) -> tuple[DiagonalGaussianDistribution, dict[int, Tensor]]:
        image = torch.cat([assembled(one) for one in images])
        return encode_with_features(self.vae, image.to(self._execution_device, self.vae.dtype), levels)

    def _decode(self, z: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        z = z.to(self._execution_device, self.vae.dtype)
        if w == 0 or self.cfw is None:
            return self.vae.decode(z, return_dict=False)[0]
        copies = len(z) // len(next(iter(features.values())))
        features = {k: v.repeat_interleave(copies, dim=0) for k, v in features.items()}
        return decode_with_features(self.vae, self.cfw, z, features, w)

    @contextmanager
    def _vae_in_safe_precision(self) -> Iterator[None]:
        """The autoencoder and CFW in float32 while they run, if half precision would overflow them."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        dtypes = [(part, part.dtype) for part in (self.vae, self.cfw) if upcast and part is not None]
        for part, _ in dtypes:
            part.to(torch.float32)
        try:
            yield
        finally:
            for part, dtype in dtypes:
                part.to(dtype)


def repeated(images: list[Readable], count: int) -> list[Readable]:
    """Each image `count` times, one after the other."""
    return [one for one in images for _ in range(count)]


def scaled_size(height: int, width: int, scale: float | None = None) -> tuple[int, int]:
    """Height and width of the result for a picture of height x width; scale=None is 4."""
    scaled_height, scaled_width = (max(round(side * (4.0 if scale is None else scale)), 1) for side in (height, width))
    return scaled_height, scaled_width


def _numbered(record: Path | None, name: str, index: int) -> Path | None:
    return None if record is None else record / f"{name}-{index}"


def _by_picture(features: dict[int, Tensor]) -> list[Features]:
    """Features of all pictures at once as canvases picture by picture; without features one empty entry."""
    pictures = max((len(one) for one in features.values()), default=1)
    return [
        {level: Canvas.from_tensor(maps[i : i + 1].float().cpu()) for level, maps in features.items()}
        for i in range(pictures)
    ]


def if_memory_suffices(code: Callable[[], Coded]) -> Coded | None:
    """What `code` makes of pictures as a whole, or None with a warning where memory lacks."""
    try:
        return code()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("not enough memory for the autoencoder on the whole picture; going on in tiles")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def in_memory(autoencoder: TiledAutoencoder, code: Callable[[], Coded]) -> Coded:
    """What `code` returns; where memory lacks, tiles are halved, down to the smallest, and it starts again."""
    while True:
        try:
            return code()
        except (RuntimeError, MemoryError) as error:
            half = autoencoder.tile_px // 2
            if half < smallest_tile_px(autoencoder.vae, autoencoder.mode) or not is_out_of_memory(error):
                raise
            logger.warning("not enough memory for tiles of %d pixels; going on with %d", autoencoder.tile_px, half)
            autoencoder.tile_px = half
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
