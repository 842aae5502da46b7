"""From the LQ latent to the restored one: timesteps, start, and what the steered UNet predicts."""

import math
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.pipelines.checking import Start
from stablesr_kit.pipelines.coding import Generators
from stablesr_kit.tiling.latents import Aggregation, LatentTiling, prediction_shapes
from stablesr_kit.tiling.memory import is_out_of_memory
from stablesr_kit.tiling.team import OthersFailed, Team


def recount(progress_bar: Any, aggregation: Aggregation, steps: range) -> None:
    """Correct a progress bar's total when the tiles of the steps still to come have become others."""
    progress_bar.total = progress_bar.n + aggregation.count(steps)


class Sampling(DiffusionPipeline):
    """The steps of a call that sample."""

    def get_timesteps(
        self,
        num_inference_steps: int | None,
        device: torch.device,
        start: Start,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> Tensor:
        """Descending timesteps of the scheduler, from `start` on if that is a timestep."""
        kept, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        first = 0
        if isinstance(start, int):
            reached = (kept <= start).nonzero()
            if len(reached) == 0:
                raise ValueError(f"start={start} lies below the last timestep {kept[-1].item():g}; give more steps")
            order = getattr(self.scheduler, "order", 1)  # Heun and its like visit a timestep `order` times
            first = math.ceil(int(reached[0]) / order) * order
            if first > 0 and isinstance(self.scheduler, PNDMScheduler):
                raise ValueError(
                    f"start={start} is given, but PNDMScheduler can only run from its first timestep, {kept[0]}; "
                    "take another scheduler, for instance UniPCMultistepScheduler.from_config"
                )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return kept[first:]

    def prepare_latents(
        self,
        lq_latents: Tensor,
        timesteps: Tensor,
        start: Start,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Latent (B, C, h, w) to start from: the LQ latent noised to the first timestep, or pure noise.

        latents: the unit noise itself instead of a drawn one, of the shape of `lq_latents`.
        """
        if latents is None:
            noise = randn_tensor(lq_latents.shape, generator, device=lq_latents.device, dtype=lq_latents.dtype)
        elif latents.shape != lq_latents.shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are given, expected {tuple(lq_latents.shape)}")
        else:
            noise = latents.to(lq_latents)
        if start == "noise":
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(lq_latents, noise, timesteps[:1].repeat(len(noise)))

    @torch.no_grad()
    def assist(self, team: Team) -> None:
        """Predict tiles for the first process of a team, which calls its pipeline with it, until it lets this one go.

        Raises:
            Exception: what happened here, once the first process has given up.
        """
        failure: Exception | None = None
        while (request := team.listen()) is not None:
            aggregation = Aggregation(
                (request.latents.shape[-2], request.latents.shape[-1]),
                LatentTiling(tile=(request.regions[0].height, request.regions[0].width), batch_size=request.batch_size),
                multiple=1,
                device=self._execution_device,
                dtype=self.unet.dtype,
            )
            own = aggregation.predictions(
                partial(self.predict, **request.arguments),
                request.latents,
                request.lq_latents,
                request.prompt_embeds.to(self._execution_device),
                request.regions,
                team.share(len(request.regions)),
            )
            try:
                team.exchange(prediction_shapes(request), own)
            except OthersFailed:
                pass
            except Exception as error:  # the first process knows too, and asks for less or gives up
                failure = failure if is_out_of_memory(error) else error
            if self._execution_device.type == "cuda":
                torch.cuda.empty_cache()
        if failure is not None:
            raise failure

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor | int,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        guidance_scale: float = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """What the steered UNet predicts at one timestep, see `steered_prediction`."""
        return steered_prediction(
            self.unet,
            self.adapter,
            latents,
            timestep,
            lq_latents,
            prompt_embeds,
            guidance_scale,
            cross_attention_kwargs=cross_attention_kwargs,
        )
