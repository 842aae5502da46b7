"""What callbacks may ask of a running call."""

from typing import Any

from diffusers import DiffusionPipeline

from stablesr_kit.tiling.autoencoder import TiledAutoencoder
from stablesr_kit.tiling.latents import Aggregation, LatentTiling


class RunningCall(DiffusionPipeline):
    """The state of a call while it runs, by the names that pipelines of diffusers have for it."""

    _guidance_scale: float
    _clip_skip: int | None
    _cross_attention_kwargs: dict[str, Any] | None
    _num_timesteps: int
    _interrupt: bool
    _aggregation: Aggregation
    _autoencoder: TiledAutoencoder | None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the UNet for the negative prompt as well."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def clip_skip(self) -> int | None:
        """Layers of the text encoder that the running call skips."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Arguments of the attention processors in the running call."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the running call."""
        return self._num_timesteps

    @property
    def tiling(self) -> LatentTiling:
        """How the running call covers the canvas of latents; lack of memory may have halved it since it began."""
        return self._aggregation.tiling

    @property
    def vae_tile_px(self) -> int | None:
        """Side of the autoencoder's tiles in the running call, likewise; None if it takes the picture whole."""
        return None if self._autoencoder is None else self._autoencoder.tile_px

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; a callback sets it through `_interrupt`."""
        return self._interrupt
