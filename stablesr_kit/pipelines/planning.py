"""Choosing the tiles of a call, in its course or before it starts."""

from typing import Any

from accelerate.utils import convert_file_size_to_int

from stablesr_kit.errors import ConfigError
from stablesr_kit.pipelines.coding import ImageCoding
from stablesr_kit.tiling.autoencoder import WINDOW, AttentionMode, TilingMode, smallest_tile_px
from stablesr_kit.tiling.costs import weight_bytes
from stablesr_kit.tiling.latents import LatentTiling
from stablesr_kit.tiling.memory_plan import MemoryPlan, Planner, free_bytes, measured_rate
from stablesr_kit.tiling.planner import (
    CPU_VAE_TILE_PX,
    LARGEST_BATCH,
    VAE_TILES_PX,
    TileSize,
    choose_tiling,
    tilings,
)


class Planning(ImageCoding):
    """The step of a call that chooses tiles."""

    def plan(
        self,
        height: int,
        width: int,
        *,
        w: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        tile_px: TileSize = "auto",
        overlap_px: int | None = None,
        tile_batch_size: int | None = None,
        vae_tile_px: int | None = None,
        vae_mode: TilingMode = "exact",
        vae_attention: AttentionMode = "global",
        max_memory: int | str | None = None,
    ) -> MemoryPlan:
        """What a call with these arguments will do, the most memory it will hold on the device, and for how long.

        What is given is kept to. The rest is chosen so that it fits: batch and tiles of the autoencoder, which do not
        change the picture, and only where that is not enough smaller tiles of latents, which do.

        height, width: of the result, in pixels. batch_size: pictures times results per picture. The others as in the
        call, which takes the plan as `plan`.

        Raises:
            ConfigError: max_memory is no size, or too little even for the smallest tiles.
            ValueError: a tile or an overlap cannot work.
        """
        device = self._execution_device
        wanted = self.given_tiling(height, width, tile_px, overlap_px)
        height, width = self.padded_size(height, width)
        size = height // self.vae_scale_factor, width // self.vae_scale_factor
        allowed = None if max_memory is None else parsed_bytes(max_memory)
        others = [] if self.text_encoder is None else [self.text_encoder]
        networks = [self.vae, self.unet, self.adapter, *([] if self.cfw is None else [self.cfw]), *others]
        held = sum(weight_bytes(network) for network in networks if network.device == device)
        if vae_tile_px is not None:
            vae_tiles_px: list[int | None] = [vae_tile_px]
        else:
            smallest = smallest_tile_px(self.vae, vae_mode)
            vae_tiles_px = [None] if wanted is None else []
            # The approximate mode's halos make tiles of 256 px compute 1.8 times the picture, of 512 px 1.3 times.
            prefers_small = device.type == "cpu" and vae_mode == "exact"
            largest = CPU_VAE_TILE_PX if prefers_small else VAE_TILES_PX[0]
            vae_tiles_px += [px for px in VAE_TILES_PX if smallest <= px <= largest]
        return Planner(self.vae, self.unet, self.adapter, self.cfw if w != 0 else None, others).plan(
            height,
            width,
            tilings(
                self.unet,
                *size,
                self.vae_scale_factor,
                tile_px,
                overlap_px,
                tile_batch_size or (1 if device.type == "cpu" else LARGEST_BATCH),
            ),
            num_inference_steps or self.config.default_steps,
            allowed if allowed is not None else free_bytes(device) + held,
            vae_tiles_px=vae_tiles_px,
            mode=vae_mode,
            window=WINDOW if vae_attention == "windowed" else None,
            pictures=batch_size,
            branches=2 if guidance_scale > 1 else 1,
            is_limit=allowed is not None,
            flops_per_second=measured_rate(device, self.unet.dtype),
        )

    def leaves_choice(
        self,
        height: int,
        width: int,
        *,
        tile_px: TileSize = "auto",
        overlap_px: int | None = None,
        tile_batch_size: int | None = None,
        vae_tile_px: int | None = None,
        max_memory: int | str | None = None,
        **_others: Any,
    ) -> bool:
        """Whether `plan` with these arguments, which takes a second or two, decides anything.

        Without a limit small pictures are taken whole.
        """
        tiling = self.given_tiling(height, width, tile_px, overlap_px, tile_batch_size)
        is_batch_given = tile_batch_size is not None or self._execution_device.type == "cpu"
        return max_memory is not None or (tiling is not None and not (is_batch_given and vae_tile_px is not None))

    def given_tiling(
        self,
        height: int,
        width: int,
        tile_px: TileSize = "auto",
        overlap_px: int | None = None,
        tile_batch_size: int | None = None,
    ) -> LatentTiling | None:
        """How a result of height x width pixels is sampled if memory does not matter."""
        height, width = (side // self.vae_scale_factor for side in self.padded_size(height, width))
        return choose_tiling(self.unet, height, width, self.vae_scale_factor, tile_px, overlap_px, tile_batch_size or 1)


def parsed_bytes(size: int | str) -> int:
    """Bytes of a number or of a text such as "6GB" (10**9) or "6GiB" (2**30).

    Raises:
        ConfigError: it is neither.
    """
    try:
        return convert_file_size_to_int(size.upper() if isinstance(size, str) else size)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"max_memory={size!r} is given, expected bytes or a size such as '6GB' or '6GiB'") from error
