"""StableSRPipeline: restore and enlarge photographs with the prior of a frozen Stable Diffusion (Wang et al. 2023)."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from stablesr_kit.checkpoints import convert_checkpoint
from stablesr_kit.checkpoints.networks import embed_prompt
from stablesr_kit.diffusion.canvas_noise import CanvasNoise, drawing_from
from stablesr_kit.diffusion.spaced import ModelSchedule, check_scheduler
from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import Part, Readable, Region
from stablesr_kit.imaging.color_fix import ColorFix, color_fixed
from stablesr_kit.imaging.resizing import Padded, reduced, resized
from stablesr_kit.models.execution import offload_groups_to_disk, to_channels_last
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping, Kept, check_autoencoder, scale_factor
from stablesr_kit.models.steering import make_steerable, steered_prediction
from stablesr_kit.models.time_aware_encoder import StableSRAdapter, check_adapter
from stablesr_kit.pipelines.arguments import (
    check_callback_tensors,
    check_count,
    check_generators,
    check_image_prompt,
    check_output,
    check_picture,
    check_size,
    check_start,
    check_texts,
    is_number,
)
from stablesr_kit.pipelines.job import Generators, Job, choose_tiles
from stablesr_kit.pipelines.loading import check_components, compile_options, resolve_model
from stablesr_kit.pipelines.pictures import (
    Images,
    OutputType,
    Picture,
    PostStage,
    as_readables,
    check_finite,
    finished,
    result_size,
)
from stablesr_kit.spaces import from_latent, to_latent
from stablesr_kit.tiling import latents as latent_tiles
from stablesr_kit.tiling.autoencoder import Features, PictureCoder, coding_bars
from stablesr_kit.tiling.latents import Aggregation, TileGrid, canvas_size, tile_multiple
from stablesr_kit.tiling.memory import Plan, Planner, Tiling
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

Start = Literal["lq", "noise"] | int
StepCallback: TypeAlias = (
    Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """All that decoding needs after sampling, see `StableSRPipeline.redecode`.

    latents: (B, C, h, w). features: of the encoder, for CFW; empty without it. lq: the LQ pictures as given, (3, H, W);
    enlarged: the same at the working size; one each per latent. coder: the autoencoder of the call. height, width: of
    the results, in pixels. record: folder for decoding in tiles, or None. is_grey: as in `Job`. kept: of CFW, for
    decoding more than once.
    """

    latents: Tensor
    features: list[Features]
    lq: list[Readable]
    enlarged: list[Readable]
    coder: PictureCoder
    height: int
    width: int
    record: Path | None = None
    is_grey: bool | None = None
    kept: dict[int, Kept] | None = None


@dataclass
class StableSRPipelineOutput(BaseOutput):
    """images: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1]; with output_type="canvas"
    a list of pictures (3, H, W), about [-1, 1], to be read by regions; with "latent" the final latents (B, C, h, w) of
    the padded pictures. sampled: with "latent" only, for `redecode`."""

    images: Images
    sampled: Sampled | None = None


class StableSRPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
):
    """Restores and enlarges photographs: an adapter steers a frozen UNet, CFW carries the input into the decoder.

    Args:
        vae: the autoencoder of the base model.
        unet: its UNet; any of the Stable Diffusion 1.x/2.x family. Nothing is added to it.
        adapter: time-aware encoder and SFT layers.
        scheduler: `SpacedDDPMScheduler` reproduces StableSR; any scheduler of diffusers for such models works.
        cfw: controllable feature wrapping; None allows w = 0 only.
        text_encoder, tokenizer: needed for prompts only; without them the adapter's stored embedding of the empty
            prompt is used.
        image_encoder, feature_extractor: needed for `ip_adapter_image` only.
        default_steps: number of steps of a call that gives none.
        min_size_px: smaller canvases are padded to this size: a UNet trained on large pictures fails on tiny ones.
        margin_px: reflected margin on all sides of the canvas, cut off at the end, since networks see zeros beyond
            their canvas and make bright borders; 0 as in the published scripts.
        working_scale: smaller enlargements are made at this scale and then reduced, since the networks are too coarse
            for finer detail; 0 never does.

    Raises:
        ConfigError: adapter or cfw belong to other networks, or the networks are of another family.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"  # adapter and cfw have hooks of their own
    _optional_components = ["cfw", "text_encoder", "tokenizer", "image_encoder", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    _guidance_scale: float
    _cross_attention_kwargs: dict[str, Any] | None
    _num_timesteps: int
    _interrupt: bool
    _schedule: ModelSchedule  # of the model, whatever scheduler is in use
    aggregation: Aggregation  # of the running or last call; its grid may have been halved for lack of memory
    coder: PictureCoder  # likewise, with the tiles of the autoencoder
    _compiled: Callable[..., Tensor] | None = None

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        adapter: StableSRAdapter,
        scheduler: KarrasDiffusionSchedulers,
        cfw: ControllableFeatureWrapping | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        default_steps: int = 50,
        min_size_px: int = 0,
        margin_px: int = 0,
        working_scale: int | float = 0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            adapter=adapter,
            scheduler=scheduler,
            cfw=cfw,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(default_steps=default_steps, min_size_px=min_size_px)
        self.register_to_config(margin_px=margin_px, working_scale=working_scale)
        self._check_networks()
        if scheduler is not None:
            self._schedule = ModelSchedule.of_config(scheduler.config)
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load "mini" (the embedded default) or "mini-preview", a folder, or a repository of the Hugging Face hub.

        Keyword arguments as `DiffusionPipeline.from_pretrained` (dtype, variant, components to replace, ...).

        Raises:
            ModelNotFoundError: there is no such model here or on the hub, or it has no adapter.
        """
        folder = resolve_model(pretrained_model_name_or_path, **kwargs)
        check_components(folder, given=kwargs)
        pipeline = super().from_pretrained(str(folder), **kwargs)
        if (folder / "scheduler" / "scheduler_config.json").is_file():  # the one in use may be another
            pipeline._schedule = ModelSchedule.of_config(pipeline.scheduler.load_config(folder / "scheduler"))
        for network in (pipeline.vae, pipeline.unet, pipeline.adapter, pipeline.cfw):
            if network is not None:
                to_channels_last(network)
        return pipeline

    @classmethod
    def from_original(cls, checkpoint: str | Path, **kwargs: Any) -> Self:
        """Build a pipeline from an official checkpoint; keyword arguments as `convert_checkpoint` (cfw, base, ...).

        Raises:
            CheckpointError: the file is of another family, or a tensor is missing, left over or of another shape.
            UnsafeCheckpointError: the file would run code.
        """
        return cls(**convert_checkpoint(checkpoint, **kwargs))

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *args: Any,
        offload_to_disk_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As in any pipeline; on disk every component gets a folder of its own in the one given."""
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, *args, **kwargs)
        else:
            offload_groups_to_disk(self.components, offload_to_disk_path, onload_device, *args, **kwargs)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As in any Stable Diffusion pipeline; a LoRA that changes nothing is refused.

        Raises:
            ConfigError: no layer of this model matches a key of the file.
        """
        before = self.get_list_adapters()
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **kwargs)
        if self.get_list_adapters() == before and not kwargs.get("hotswap"):
            hint = "" if self.text_encoder is not None else ", and this pipeline has no text encoder"
            raise ConfigError(
                f"none of this LoRA's keys belongs to a layer of the UNet or the text encoder{hint}; "
                "give one that was made for a model of this family"
            )

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, Any], network_alphas: Any, text_encoder: Any, **kwargs: Any
    ) -> None:
        """As in any Stable Diffusion pipeline; warns if there are layers for a text encoder but there is none."""
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, **kwargs)
        elif any(key.startswith("text_encoder") for key in state_dict):
            logger.warning("this LoRA's layers of the text encoder are left out: the pipeline has no text encoder")

    def check_decoding(self, w: float, color_fix: str, output_type: str, post_stages: Sequence[PostStage]) -> None:
        """Refuse arguments of `redecode`, and of a call, that cannot work. Raises ValueError."""
        if not (is_number(w) and w >= 0):
            raise ValueError(
                f"w={w!r} is given, expected a number from 0 (realism) to 1 (fidelity); above 1 extrapolates"
            )
        if w > 0 and self.cfw is None:
            raise ValueError(f"w={w} needs the component cfw, which this pipeline lacks; give w=0 or load a cfw")
        check_output(color_fix, output_type, post_stages)

    def _check_networks(self) -> None:
        """Refuse networks that do not belong together, and make the UNet able to take SFT maps."""
        if self.unet is not None:
            make_steerable(self.unet)
            if self.adapter is not None:
                check_adapter(self.adapter, self.unet)
        if self.vae is not None:
            check_autoencoder(self.vae, self.cfw)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each (len(prompt) * num_images_per_prompt, tokens, channels).

        No prompt is the empty one, embedded by the text encoder (so that its LoRA layers count) or, without one, stored
        in the adapter. negative_prompt_embeds is None without guidance.

        clip_skip: layers of the text encoder to skip; the call takes the result as `prompt_embeds`.

        Raises:
            ValueError: there is a prompt but no text encoder and tokenizer.
        """
        if prompt_embeds is None:
            prompt_embeds = self._embed(prompt, device, lora_scale, clip_skip)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = self._embed(negative_prompt, device, lora_scale, clip_skip)

        dtype = self.unet.dtype if self.unet is not None else prompt_embeds.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def _embed(
        self, prompt: str | list[str] | None, device: torch.device, lora_scale: float | None, clip_skip: int | None
    ) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            stored = self.adapter.empty_prompt_embeds if self.adapter is not None else None
            if prompt in (None, "") and stored is not None:
                return stored
            raise ValueError(
                f"prompt={prompt!r} needs the components text_encoder and tokenizer, which this pipeline lacks; "
                "load them, or give no prompt"
            )
        texts = self.maybe_convert_prompt(prompt if isinstance(prompt, list) else [prompt or ""], self.tokenizer)
        if lora_scale is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            return embed_prompt(texts, self.text_encoder, self.tokenizer, device, clip_skip)
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)

    encode_image = StableDiffusionImg2ImgPipeline.encode_image  # for IP adapters
    prepare_ip_adapter_image_embeds = StableDiffusionImg2ImgPipeline.prepare_ip_adapter_image_embeds

    def prepare_image(
        self, image: Readable, scale: float | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[Readable, Readable]:
        """The picture (3, h, w) at the result's size, and the same padded by reflection to its `padded_size`.

        The result is scale (default 4) times as large, or height x width pixels; enlarging is bicubic.
        """
        if height is None or width is None:
            height, width = result_size(*image.shape[1:], scale)
        enlarged = resized(image, height, width)
        return enlarged, Padded(enlarged, *self.padded_size(height, width), self.config.margin_px)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas for a result of height x width and its margin, see `canvas_size`."""
        return canvas_size(
            self.unet, height, width, self.vae_scale_factor, self.config.min_size_px, self.config.margin_px
        )

    def _inside(self, height: int, width: int) -> Region:
        """The region of a result of height x width pixels on its canvas."""
        margin = self.config.margin_px
        return Region(margin, margin, margin + height, margin + width)

    def encode(
        self,
        images: Sequence[Readable],
        generator: Generators = None,
        with_features: bool = True,
        num_images_per_prompt: int = 1,
        coder: PictureCoder | None = None,
        record: Path | None = None,
    ) -> tuple[Tensor, list[Features]]:
        """LQ latents (B * num_images_per_prompt, C, h, w), samples of the posterior, and the features CFW needs.

        images: B of them, (3, H, W) in [-1, 1], of a `padded_size`. Features are dicts level -> (b, C, h, w), one for
        all pictures or one each; empty without cfw, or with with_features=False. coder: None takes pictures whole.
        record: as in `PictureCoder.encode`.
        """
        coder = coder or PictureCoder(self.vae, self.cfw)
        levels = tuple(self.cfw.config.levels) if with_features and self.cfw is not None else ()
        moments, features = coder.encode(images, levels, record)
        if generator is not None:  # it may only draw on the device
            moments = moments.to(self._execution_device)
        z = DiagonalGaussianDistribution(moments.repeat_interleave(num_images_per_prompt, dim=0)).sample(generator)
        return to_latent(z, self.vae).to(self.unet.dtype), features

    def get_timesteps(
        self,
        num_inference_steps: int | None,
        device: torch.device,
        start: Start = "lq",
        strength: float | None = None,
        timesteps: list[int] | None = None,
    ) -> Tensor:
        """Descending timesteps of the scheduler, from `start` on if it is a timestep, or the last share `strength`.

        Raises:
            ValueError: no timestep is left, or the scheduler can only run from its first one.
        """
        kept, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps)
        order = getattr(self.scheduler, "order", 1)  # Heun and its like visit a timestep `order` times
        first = 0
        if isinstance(start, Integral):
            reached = (kept <= start).nonzero()
            if len(reached) == 0:
                raise ValueError(f"start={start} lies below the last timestep {kept[-1].item():g}; give more steps")
            first = math.ceil(int(reached[0]) / order) * order
        elif strength is not None:
            steps = num_inference_steps or math.ceil(len(kept) / order)
            first = min((steps - min(int(steps * strength), steps)) * order, len(kept))
        if first > 0 and isinstance(self.scheduler, PNDMScheduler):
            given = f"start={start}" if strength is None else f"strength={strength}"
            raise ValueError(
                f"{given} is given, but PNDMScheduler can only run from its first timestep, {kept[0]}; "
                "take another scheduler, for instance UniPCMultistepScheduler.from_config"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return kept[first:]

    def prepare_latents(
        self,
        lq_latents: Tensor,
        timesteps: Tensor,
        start: Start = "lq",
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
        if len(timesteps) == 0:  # strength 0
            return lq_latents
        return self.scheduler.add_noise(lq_latents, noise, timesteps[:1].repeat(len(noise)))

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
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        start: Start = "lq",
        strength: float | None = None,
        color_fix: ColorFix = "wavelet",
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        tiling: Tiling | None = None,
        job: Job | None = None,
        post_stages: Sequence[PostStage] = (),
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the signature of diffusers
    ) -> StableSRPipelineOutput | tuple[Any, ...]:
        r"""Restore pictures.

        Args:
            image: the LQ picture or pictures (all of one size), of any height and width: PIL images, arrays (H, W, 3)
                or tensors (3, H, W), uint8 or float in [0, 1]; or canvases (3, H, W) in [-1, 1] for pictures larger
                than memory.
            prompt: what the picture shows; None, as in the adapter's training, is no text.
            w: 0 realism to 1 fidelity (CFW), default 0.5; above 1 extrapolates. Without cfw it is 0.
            scale: size of the result relative to the input, default 4.
            height, width: size of the result, instead of `scale`.
            num_inference_steps: denoising steps; None is the pipeline's `default_steps`.
            timesteps: custom ones, for schedulers that take them.
            guidance_scale: classifier-free guidance, on above 1.
            negative_prompt: what the picture should not look like; used with guidance.
            num_images_per_prompt: results per picture.
            start: "lq": the noised LQ latent; "noise": pure noise; a number: the LQ latent noised to the first timestep
                not above it.
            strength: 0 to 1, instead of `start`: the share of steps that are run, from the LQ latent noised to match.
            color_fix: "wavelet", "adain" or "none": where the result's colours come from.
            generator: source of all randomness, or one per result.
            latents: unit noise (B, C, h, w) to start with, instead of drawn noise.
            prompt_embeds, negative_prompt_embeds: text embeddings instead of prompts, one or one per picture.
            ip_adapter_image: a picture per loaded IP adapter, for style or content.
            ip_adapter_image_embeds: their embeddings instead, (1, images, channels) per IP adapter, or with guidance
                (2, images, channels), those of no picture first.
            output_type: "pil", "np", "pt", "canvas", or "latent" for `redecode`.
            return_dict: False returns a tuple.
            cross_attention_kwargs: for the attention processors; "scale" weighs LoRA layers.
            tiling: tiles, memory and disk for large pictures; None chooses automatically.
            job: for calls that are resumed or shared by processes.
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
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = self.config.default_steps
        if self.adapter is None:
            raise ValueError("adapter=None is given, expected a StableSRAdapter; load one, see from_pretrained")
        self._check_networks()
        check_scheduler(self.scheduler, self._schedule)
        check_picture(image, prompt)
        check_size(scale, height, width)
        check_count("num_inference_steps", num_inference_steps)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, guidance_scale)
        check_image_prompt(self, ip_adapter_image, ip_adapter_image_embeds)
        check_start(start, strength)
        self.check_decoding(w, color_fix, output_type, post_stages)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        tiling, job = tiling or Tiling(), job or Job()
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Bring the picture to the result's size, on a canvas that the networks can halve evenly
        given = as_readables(image)
        prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        if len(given) != prompts and 1 not in (len(given), prompts):
            raise ValueError(f"{prompts} prompts are given for {len(given)} pictures; give one, or one per picture")
        given = given * (max(prompts, len(given)) // len(given))
        lq_px = given[0].shape[1], given[0].shape[2]
        result_px = (height, width) if height and width else result_size(*lq_px, scale)
        size_px = tiling.working_size(lq_px, result_px, self.config.working_scale)
        enlarged, canvases = zip(*(self.prepare_image(one, None, *size_px) for one in given), strict=True)
        batch_size = len(given) * num_images_per_prompt
        check_generators(generator, batch_size)

        # 3. Encode the prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        prompt_embeds = _for_batch(prompt_embeds, batch_size, num_images_per_prompt)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = _for_batch(negative_prompt_embeds, batch_size, num_images_per_prompt)
            if negative_prompt_embeds.shape != prompt_embeds.shape:
                raise ValueError(
                    f"prompt_embeds of shape {tuple(prompt_embeds.shape[1:])} and negative_prompt_embeds of shape "
                    f"{tuple(negative_prompt_embeds.shape[1:])} are given; give both, padded to one length"
                )
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        image_embeds: list[Tensor] = []
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch_size, self.do_classifier_free_guidance
            )
            image_embeds = [embeds.to(self.unet.dtype) for embeds in image_embeds]

        # 4. Choose tiles; a tiled canvas stays on the CPU, and its noise depends on seed and position alone
        grid, vae_tile_px = choose_tiles(
            self,
            *size_px,
            tiling,
            job,
            w=w,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        )
        noise = job.noise
        if grid is not None and "ip_adapter_masks" in (cross_attention_kwargs or {}):
            raise ValueError("ip_adapter_masks are of the whole picture; give tiling=Tiling(tile_px='none') with them")
        if grid is not None and noise is None:
            noise = CanvasNoise.from_generator(generator, batch_size)
        generator = generator if noise is None else None
        progress = job.progress or coding_bars(getattr(self, "_progress_bar_config", {}))
        self.coder = coder = tiling.coder(self.vae, self.cfw, vae_tile_px, progress)

        # 5. Encode the picture
        with drawing_from(noise, stage=0):
            lq_latents, features = self.encode(canvases, generator, w > 0, num_images_per_prompt, coder, job.record)
        lq_latents = lq_latents.to(device) if grid is None else lq_latents.cpu().float()

        # 6. Choose the timesteps and the latent to start from
        # On the CPU, where schedulers look up numbers: on a GPU every step would wait for it
        kept_timesteps = self.get_timesteps(num_inference_steps, torch.device("cpu"), start, strength, timesteps)
        with drawing_from(noise, stage=1):
            latents = self.prepare_latents(lq_latents, kept_timesteps, start, generator, latents)
        first_step = 0
        if job.state is not None:
            latents, first_step = job.state.restore(latents, self.scheduler, generator), job.state.step

        # 7. Denoise
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        aggregation = Aggregation(
            (latents.shape[-2], latents.shape[-1]),
            grid,
            tile_multiple(self.unet),
            device,
            self.unet.dtype,
            jitter_seed=noise.seeds[0] if noise is not None and tiling.jitter else None,
            team=job.team if grid is not None else None,
        )
        if job.state is not None and job.state.grid is not None:
            aggregation.grid = TileGrid(**job.state.grid)
        self.aggregation = aggregation
        self._num_timesteps = len(kept_timesteps)
        parts = aggregation.count(range(first_step, self._num_timesteps))
        with (
            job.progress("sampling", parts, "step") if job.progress else self.progress_bar(total=parts) as progress_bar
        ):
            aggregation.show_on(progress_bar, range(first_step, self._num_timesteps))
            for i, t in enumerate(kept_timesteps):
                if self.interrupt or i < first_step:
                    continue
                scaled = self.scheduler.scale_model_input(latents, t)
                prediction = aggregation.predict(
                    partial(
                        self.predict,
                        self.unet,
                        self.adapter,
                        timestep=t,
                        guidance_scale=self.guidance_scale,
                        cross_attention_kwargs=cross_attention_kwargs,
                    ),
                    scaled,
                    lq_latents,
                    prompt_embeds,
                    i,
                    image_embeds,
                    on_tile=progress_bar.update,
                    on_halving=partial(aggregation.show_on, progress_bar, range(i, self._num_timesteps)),
                )
                if job.on_prediction is not None:
                    prediction = job.on_prediction(prediction, scaled, t, i)
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

        # 8. Decode and finish, or keep what that takes
        sampled = Sampled(
            latents=latents,
            features=features,
            lq=[one for one in given for _ in range(num_images_per_prompt)],
            enlarged=[one for one in enlarged for _ in range(num_images_per_prompt)],
            coder=coder,
            height=result_px[0],
            width=result_px[1],
            record=job.record,
            is_grey=job.is_grey,
            kept={} if output_type == "latent" else None,
        )
        if output_type != "latent":
            return self.redecode(sampled, w, color_fix, post_stages, output_type, return_dict)
        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=latents, sampled=sampled) if return_dict else (latents, sampled)

    @torch.no_grad()
    def redecode(
        self,
        sampled: Sampled,
        w: float | None = None,
        color_fix: ColorFix = "wavelet",
        post_stages: Sequence[PostStage] = (),
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> StableSRPipelineOutput | tuple[Any, ...]:
        """Pictures of a call with output_type="latent", decoded and finished any number of times without sampling.

        Arguments as in a call.

        Raises:
            ValueError: an argument cannot work, or w is above 0 but the call had w=0 and kept no features for CFW.
        """
        if w is None:
            w = 0.5 if self.cfw is not None and any(sampled.features) else 0.0
        self.check_decoding(w, color_fix, output_type, post_stages)
        if w > 0 and not any(sampled.features):
            raise ValueError(f"w={w} needs the features that a call with w > 0 keeps; call again with w > 0")
        decoded = self.decode(sampled.latents, sampled.features, w, sampled.coder, sampled.record, sampled.kept)
        size_px = sampled.height, sampled.width
        images = self.finish(
            decoded, sampled.enlarged, sampled.lq, color_fix, post_stages, output_type, sampled.is_grey, size_px
        )
        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=images) if return_dict else (images,)

    def decode(
        self,
        latents: Tensor,
        features: list[Features],
        w: float,
        coder: PictureCoder | None = None,
        record: Path | None = None,
        kept: dict[int, Kept] | None = None,
    ) -> list[Readable]:
        """Images (3, H, W), about [-1, 1], of latents (B, C, h, w); kept: as `PictureCoder.decode` has it, the other
        arguments as `encode`.

        Raises:
            FloatingPointError: the UNet or the decoder overflowed.
        """
        coder = coder or PictureCoder(self.vae, self.cfw)
        images = coder.decode(from_latent(latents, self.vae), features, w, record, kept)
        check_finite(images, self.unet.dtype, self.vae.dtype)
        return images

    def finish(
        self,
        decoded: Sequence[Readable],
        enlarged: Sequence[Readable],
        lq: Sequence[Readable],
        color_fix: ColorFix = "wavelet",
        post_stages: Sequence[PostStage] = (),
        output_type: OutputType = "pil",
        is_grey: bool | None = None,
        size_px: tuple[int, int] | None = None,
    ) -> Images:
        """Decoded canvases cut back to the picture, with the input's colours, after the post-stages, of an output type.

        What is made of a grey picture is grey, see `imaging.color_fix`; is_grey: as `Job` has it.

        enlarged: the LQ pictures at the size that was worked at. lq: as they were given. size_px: height and width of
        the results, None for that of enlarged. The post-stages take images whole.
        """
        restored = [
            color_fixed(Part(image, self._inside(*reference.shape[1:])), reference, color_fix)
            for image, reference in zip(decoded, enlarged, strict=True)
        ]
        if size_px is not None:
            restored = [reduced(one, *size_px) for one in restored]
        return finished(restored, lq, post_stages, output_type, self.image_processor, is_grey)

    def plan(
        self,
        height: int,
        width: int,
        *,
        w: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        tiling: Tiling | None = None,
    ) -> Plan:
        """What a call with these arguments will do, the most memory it will hold on the device, and for how long.

        height, width: of the result, in pixels, or what it is made at, see `Tiling.working_size`. batch_size: pictures
        times results per picture. The others as in the call, which takes the plan as `Job(plan=...)`. What is chosen
        how, and what is raised: `Planner.plan`.
        """
        others = [network for network in (self.text_encoder, self.image_encoder) if network is not None]
        cfw = self.cfw if w != 0 else None
        return Planner(self.vae, self.unet, self.adapter, cfw, others).plan(
            *self.padded_size(height, width),
            tiling or Tiling(),
            self._execution_device,
            steps=num_inference_steps or self.config.default_steps,
            pictures=batch_size,
            branches=2 if guidance_scale > 1 else 1,
            margin_px=self.config.margin_px,
        )

    def needs_plan(self, height: int, width: int, tiling: Tiling) -> bool:
        """Whether `plan`, which takes a second or two, has anything to decide for a result of height x width pixels."""
        return tiling.leaves_choice(self.grid_of(height, width, tiling), self._execution_device)

    def grid_of(self, height: int, width: int, tiling: Tiling) -> TileGrid | None:
        """Tiles of latents for a result of height x width pixels if memory does not matter; None: no tiles."""
        height, width = self.padded_size(height, width)
        factor = self.vae_scale_factor
        return tiling.grid(self.unet, height // factor, width // factor, factor, self.config.margin_px // factor)

    def predict(
        self, unet: UNet2DConditionModel, adapter: StableSRAdapter, *, latents: Tensor, timestep: Tensor, **kwargs: Any
    ) -> Tensor:
        """As `steered_prediction`, and compiled after `compile_prediction`."""
        # Filled in on the device: a copy of the number would wait for all that the device still has to do.
        at = torch.full((), timestep.item(), dtype=timestep.dtype, device=latents.device)
        if self._compiled is None:
            return steered_prediction(unet, adapter, latents, at, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(unet, adapter, latents, at, **kwargs).clone()  # graphs write over what they gave before

    def compile_prediction(self, **options: Any) -> None:
        """Compile adapter and UNet into one for all later calls: the first step of a size takes minutes, others less.

        options: of `torch.compile`; the defaults are those of `compile_options`.
        """
        self._compiled = torch.compile(steered_prediction, **compile_options(self._execution_device, **options))

    @torch.no_grad()
    def assist(self, team: Team) -> None:
        """Predict tiles for the first process of a team, which calls its pipeline with it, until it ends the call.

        Raises:
            Exception: this process's own error, raised after the first process has stopped.
        """
        predict = partial(self.predict, self.unet, self.adapter)
        latent_tiles.assist(team, predict, self._execution_device, self.unet.dtype)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the UNet for the negative prompt as well."""
        return self._guidance_scale > 1

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Arguments of the attention processors in the running call."""
        return self._cross_attention_kwargs

    @property
    def default_steps(self) -> int:
        """Steps of a call that gives no number."""
        return int(self.config.default_steps)

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; a callback sets it through `_interrupt`."""
        return self._interrupt


def _for_batch(embeds: Tensor, batch_size: int, num_images_per_prompt: int) -> Tensor:
    """Embeddings (batch_size, tokens, channels), of one prompt for all results or of one per picture.

    embeds: as `encode_prompt` returns them, `num_images_per_prompt` rows per prompt. Raises ValueError.
    """
    if len(embeds) not in (num_images_per_prompt, batch_size):
        prompts, pictures = len(embeds) // num_images_per_prompt, batch_size // num_images_per_prompt
        raise ValueError(f"{prompts} prompts are given for {pictures} pictures; give one, or one per picture")
    return embeds.repeat(batch_size // len(embeds), 1, 1)
