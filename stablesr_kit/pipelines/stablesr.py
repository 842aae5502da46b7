"""StableSRPipeline: restore and enlarge photographs with the prior of a frozen Stable Diffusion (Wang et al. 2023)."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, replace_example_docstring
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stablesr_kit.checkpoints import convert_checkpoint
from stablesr_kit.diffusion.canvas_noise import CanvasNoise, drawing_from
from stablesr_kit.imaging.canvas import Part, Readable, Region
from stablesr_kit.imaging.color_fix import ColorFix, color_fixed
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping, check_autoencoder
from stablesr_kit.models.steering import make_steerable
from stablesr_kit.models.time_aware_encoder import StableSRAdapter, check_adapter
from stablesr_kit.pipelines.checking import InputChecks, OutputType, Start
from stablesr_kit.pipelines.coding import Generators, PostStage, repeated
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.pipelines.pictures import Picture, as_readables
from stablesr_kit.pipelines.planning import Planning
from stablesr_kit.pipelines.prompting import PromptEncoding, batch_size_of, embeds_of_batch
from stablesr_kit.pipelines.running_call import RunningCall
from stablesr_kit.pipelines.sampling import Sampling, recount
from stablesr_kit.pipelines.sampling_state import SamplingState
from stablesr_kit.tiling.autoencoder import AttentionMode, TilingMode
from stablesr_kit.tiling.latents import Aggregation, LatentTiling
from stablesr_kit.tiling.memory_plan import MemoryPlan
from stablesr_kit.tiling.planner import TileSize, tile_multiple
from stablesr_kit.tiling.team import Team

logger = logging.getLogger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from stablesr_kit import StableSRPipeline

        >>> pipeline = StableSRPipeline.from_pretrained("mini")
        >>> restored = pipeline(Image.open("photo.jpg"), w=0.5).images[0]
        >>> restored.save("restored.png")
        ```
"""

StepCallback: TypeAlias = (
    Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
)


@dataclass
class StableSRPipelineOutput(BaseOutput):
    """images: restored pictures; a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1]; with
    output_type="canvas" a list of pictures (3, H, W), about [-1, 1], to be read by regions; with "latent" the final
    latents (B, C, h, w) of the padded pictures."""

    images: list[PIL.Image.Image] | list[Readable] | np.ndarray | Tensor


class StableSRPipeline(
    RunningCall, InputChecks, PromptEncoding, Planning, Sampling, StableDiffusionMixin, StableDiffusionLoraLoaderMixin
):
    """Restores and enlarges photographs: an adapter steers a frozen UNet, CFW carries the input into the decoder.

    Args:
        vae: the autoencoder of the base model.
        unet: its UNet; any of the Stable Diffusion 1.x/2.x family. Nothing is added to it.
        adapter: time-aware encoder and SFT layers.
        scheduler: `SpacedDDPMScheduler` reproduces StableSR; any scheduler of diffusers works.
        cfw: controllable feature wrapping; None allows w = 0 only.
        text_encoder, tokenizer: needed for prompts only; without them the adapter's stored embedding of the empty
            prompt is used.
        default_steps: number of steps if the call names none.
        min_size_px: smaller results are restored on a canvas padded to this size, since a UNet trained on large
            pictures fails on tiny ones.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # adapter and cfw have hooks of their own
    _optional_components = ["cfw", "text_encoder", "tokenizer"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter,
        scheduler: KarrasDiffusionSchedulers,
        cfw: ControllableFeatureWrapping | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        default_steps: int = 50,
        min_size_px: int = 0,
    ) -> None:
        super().__init__()
        if unet is not None:
            make_steerable(unet)
            if adapter is not None:
                check_adapter(adapter, unet)
        if vae is not None:
            check_autoencoder(vae, cfw)
        self.register_modules(
            vae=vae,
            unet=unet,
            adapter=adapter,
            scheduler=scheduler,
            cfw=cfw,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(default_steps=default_steps, min_size_px=min_size_px)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load "mini" (the embedded default), a folder, or a repository of the Hugging Face hub.

        Keyword arguments as `DiffusionPipeline.from_pretrained` (dtype, variant, components to replace, ...).

        Raises:
            ModelNotFoundError: there is no such model here or on the hub.
        """
        pipeline = super().from_pretrained(str(resolve_model(pretrained_model_name_or_path, **kwargs)), **kwargs)
        for network in (pipeline.vae, pipeline.unet, pipeline.adapter, pipeline.cfw):
            if network is not None:  # convolutions on the CPU are a fifth faster in this layout
                network.to(memory_format=torch.channels_last)
        return pipeline

    @classmethod
    def from_original(cls, checkpoint: str | Path, **kwargs: Any) -> Self:
        """Build a pipeline from an official checkpoint; keyword arguments as `convert_checkpoint` (cfw, base, ...).

        Raises:
            CheckpointError: the file is of another family, or a tensor is missing, left over or of another shape.
            UnsafeCheckpointError: the file would run code.
        """
        return cls(**convert_checkpoint(checkpoint, **kwargs))

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Picture | list[Picture] | None = None,
        prompt: str | list[str] | None = None,
        w: float | None = None,
        scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        start: Start = "lq",
        eta: float = 0.0,
        color_fix: ColorFix = "wavelet",
        generator: Generators = None,
        latents: Tensor | None = None,
        state: SamplingState | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        tile_px: TileSize = "auto",
        overlap_px: int | None = None,
        tile_batch_size: int | None = None,
        tile_jitter: bool = False,
        vae_tile_px: int | None = None,
        vae_mode: TilingMode = "exact",
        vae_attention: AttentionMode = "global",
        canvas_folder: Path | None = None,
        record: Path | None = None,
        max_memory: int | str | None = None,
        plan: MemoryPlan | None = None,
        team: Team | None = None,
        post_stages: Sequence[PostStage] = (),
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the signature of diffusers
    ) -> StableSRPipelineOutput | tuple[Any]:
        r"""Restore pictures.

        Args:
            image: the LQ picture or pictures (all of one size), of any height and width: PIL images, arrays (H, W, 3)
                or tensors (3, H, W), uint8 or float in [0, 1]; or canvases (3, H, W) in [-1, 1], for pictures that are
                too large to be held in memory.
            prompt: what the picture shows; None, the default and what the adapter is trained with, is no text.
            w: 0 realism to 1 fidelity (CFW), default 0.5; above 1 extrapolates. Without cfw it is 0.
            scale: size of the result relative to the input, default 4.
            height, width: size of the result, instead of `scale`.
            num_inference_steps: denoising steps; None is the pipeline's `default_steps`.
            timesteps, sigmas: custom schedules, for schedulers that take them.
            guidance_scale: classifier-free guidance, on above 1.
            negative_prompt: what the picture should not look like; used with guidance.
            num_images_per_prompt: results per picture.
            start: "lq" starts from the noised LQ latent, "noise" from pure noise, a number from the LQ latent noised
                to the first timestep not above it.
            eta: noise of DDIM steps, 0 to 1; other schedulers ignore it.
            color_fix: "wavelet", "adain" or "none": where the result's colours come from.
            generator: source of all randomness, or one per result.
            latents: unit noise (B, C, h, w) to start with instead of a drawn one.
            state: go on where another call with these arguments stood, to the bit; None begins.
            prompt_embeds, negative_prompt_embeds: text embeddings instead of prompts, one or one per picture.
            output_type: "pil", "np", "pt", "canvas", or "latent" for the undecoded latents.
            return_dict: False returns a tuple.
            cross_attention_kwargs: passed to the attention processors; "scale" weighs LoRA layers.
            clip_skip: layers of the text encoder to skip.
            tile_px: side of the tiles a large picture is sampled in, in pixels of the result; "auto" takes the size
                the UNet was trained on, and leaves pictures of up to four times its area whole; "none" never tiles.
            overlap_px: what neighbouring tiles share, in pixels; None is a quarter of a tile.
            tile_batch_size: tiles the networks take at once, on devices that gain by it; None as many as fit.
            tile_jitter: moves the tiles at every step, so that no border stays in place.
            vae_tile_px: side of the tiles the autoencoder and CFW take, on which the result does not depend; None is
                what fits, and small pictures whole.
            vae_mode: "exact" codes a tiled picture as if it were whole; "approximate" nearly so, with less on disk.
            vae_attention: "global", or "windowed" where the quadratic cost of global attention is too high.
            canvas_folder: where large feature maps of a tiled picture lie meanwhile; None is the temporary folder.
            record: a folder for the feature maps of a tiled picture and for what of it is encoded and decoded: a call
                with the same arguments goes on where another one was killed, to the bit. None records nothing.
            max_memory: what the device may hold, in bytes or as "6GB"; None is what is free on it. If it is too little
                for the tiles of "auto", smaller ones are taken, which changes the picture, and a warning says so.
            plan: of the method `plan`, with tiles for a picture of this size, instead of choosing them now.
            team: processes that predict tiles of a tiled picture as well, see `assist`; the autoencoder runs in this
                one alone. None is this process.
            post_stages: called one after the other, after the colour fix, as `stage(images, lq_images) -> images`:
                the restored images (B, 3, H, W) and the LQ ones at their own size (B, 3, h, w), both in [-1, 1].
                `FaceRefinement` is one.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every step; returns the
                tensors it changed.
            callback_on_step_end_tensor_inputs: the tensors it gets, of `_callback_tensor_inputs`.

        Examples:

        Returns:
            `StableSRPipelineOutput`, or a tuple whose first element is the pictures.

        Raises:
            ValueError: an argument cannot work; the message says what is expected.
        """
        # 1. Check the arguments
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if w is None:
            w = 0.5 if self.cfw is not None else 0.0
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = self.config.default_steps
        self.check_inputs(
            image,
            w,
            scale,
            height,
            width,
            num_inference_steps,
            num_images_per_prompt,
            start,
            color_fix,
            output_type,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
            tile_batch_size,
            has_post_stages=bool(post_stages),
        )
        self._guidance_scale = guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Bring the picture to the result's size, on a canvas that the networks can halve evenly
        given = as_readables(image)
        batch_size = batch_size_of(len(given), prompt, prompt_embeds)
        given = given * (batch_size // len(given))
        enlarged = [self.upsample(one, scale, height, width) for one in given]
        canvases = [self.pad(one) for one in enlarged]
        canvas_size = canvases[0].shape[1:]

        # 3. Encode the prompt
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        batch_size *= num_images_per_prompt
        if isinstance(generator, list) and len(generator) not in (1, batch_size):
            raise ValueError(f"{len(generator)} generators are given for {batch_size} results; give one, or one each")
        prompt_embeds, negative_prompt_embeds = embeds_of_batch(
            prompt_embeds, negative_prompt_embeds, batch_size, num_images_per_prompt
        )

        # 4. Choose tiles; a tiled canvas stays on the CPU, and its noise depends on seed and position alone
        tiling = self.given_tiling(*canvas_size, tile_px, overlap_px, tile_batch_size)
        options: dict[str, Any] = {"tile_px": tile_px, "overlap_px": overlap_px, "tile_batch_size": tile_batch_size}
        options |= {"vae_tile_px": vae_tile_px, "max_memory": max_memory}
        if plan is None and self.leaves_choice(*canvas_size, **options):
            plan = self.plan(
                *canvas_size,
                w=w,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                vae_mode=vae_mode,
                vae_attention=vae_attention,
                **options,
            )
            if plan.is_reduced:
                logger.warning("%s", plan)
        if plan is not None:
            tiling, vae_tile_px = plan.tiling, plan.vae_tile_px
        if state is not None and state.tiling is not None:
            vae_tile_px = state.vae_tile_px
        noise = autoencoder = None
        if tiling is not None:
            noise, generator = CanvasNoise.from_generator(generator, batch_size), None
        if vae_tile_px is not None:
            autoencoder = self.prepare_autoencoder(*canvas_size, vae_tile_px, vae_mode, vae_attention, canvas_folder)
        self._autoencoder = autoencoder

        # 5. Encode the picture
        with_features = w > 0 and output_type != "latent"
        with drawing_from(noise, stage=0):
            lq_latents, features = self.encode_image(
                canvases, generator, with_features, num_images_per_prompt, autoencoder, record
            )
        lq_latents = lq_latents.to(device) if tiling is None else lq_latents.cpu().float()

        # 6. Choose the timesteps and the latent to start from
        kept_timesteps = self.get_timesteps(num_inference_steps, lq_latents.device, start, timesteps, sigmas)
        with drawing_from(noise, stage=1):
            latents = self.prepare_latents(lq_latents, kept_timesteps, start, generator, latents)
        first_step = 0
        if state is not None:
            latents, first_step = state.restore(latents, self.scheduler, generator), state.step

        # 7. Denoise
        step_kwargs = {"generator": generator, "eta": eta}
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {key: value for key, value in step_kwargs.items() if key in accepted}
        aggregation = Aggregation(
            (latents.shape[-2], latents.shape[-1]),
            tiling,
            tile_multiple(self.unet),
            device,
            self.unet.dtype,
            jitter_seed=noise.seeds[0] if noise is not None and tile_jitter else None,
            team=team if tiling is not None else None,
        )
        if state is not None and state.tiling is not None:
            aggregation.tiling = LatentTiling(**state.tiling)
        self._aggregation = aggregation
        self._num_timesteps = len(kept_timesteps)
        with self.progress_bar(total=aggregation.count(range(first_step, self._num_timesteps))) as progress_bar:
            for i, t in enumerate(kept_timesteps):
                if self.interrupt or i < first_step:
                    continue
                model_input = self.scheduler.scale_model_input(latents, t)
                predict = partial(
                    self.predict,
                    timestep=t,
                    guidance_scale=self.guidance_scale,
                    cross_attention_kwargs=cross_attention_kwargs,
                )
                prediction = aggregation.predict(
                    predict,
                    model_input,
                    lq_latents,
                    prompt_embeds,
                    i,
                    on_tile=progress_bar.update,
                    on_halving=partial(recount, progress_bar, aggregation, range(i, self._num_timesteps)),
                )
                with drawing_from(noise, stage=2 + i):
                    latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    asked = {key: tensors[key] for key in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, asked)
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.pop("negative_prompt_embeds", negative_prompt_embeds)

        # 8. Decode, cut the canvas back to the picture, give it the input's colours, let the post-stages work
        if output_type == "latent":
            images = latents
        else:
            decoded = self.decode_latents(latents, features, w, autoencoder, record)
            given, enlarged = (repeated(images, num_images_per_prompt) for images in (given, enlarged))
            restored = [
                color_fixed(Part(image, Region(0, 0, *reference.shape[1:])), reference, color_fix)
                for image, reference in zip(decoded, enlarged, strict=True)
            ]
            images = self.finish(restored, given, post_stages, output_type)

        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=images) if return_dict else (images,)
