"""StableSRPipeline: restore and enlarge photographs with the prior of a frozen Stable Diffusion (Wang et al. 2023)."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stablesr_kit.checkpoints import convert_checkpoint
from stablesr_kit.diffusion.guidance import classifier_free_guidance
from stablesr_kit.imaging.color_fix import ColorFix, apply_color_fix
from stablesr_kit.imaging.padding import pad_to
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.models.sft_unet import SFTUNet2DConditionModel
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.pipelines.pictures import Picture, to_image
from stablesr_kit.spaces import from_latent, to_latent

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
OutputType = Literal["pil", "np", "pt", "latent"]
Generators = torch.Generator | list[torch.Generator] | None
StepCallback: TypeAlias = (
    Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
)


@dataclass
class StableSRPipelineOutput(BaseOutput):
    """images: restored pictures; a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or,
    with output_type="latent", the final latents (B, C, h, w) of the padded pictures."""

    images: list[PIL.Image.Image] | np.ndarray | Tensor


class StableSRPipeline(
    DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
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
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

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

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any pipeline; a stock UNet is made able to take SFT maps.

        It is saved as the stock one, whose keys and config it has, so that any pipeline may load the folder.
        """
        is_unet = name == "unet" and value is not None
        super().__setattr__(name, SFTUNet2DConditionModel.from_unet(value) if is_unet else value)
        if is_unet:
            self.register_to_config(unet=("diffusers", "UNet2DConditionModel"))

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

    # The steps of a call, in order.

    def check_inputs(
        self,
        image: Picture | list[Picture] | None,
        w: float,
        scale: float | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        num_images_per_prompt: int,
        start: Start,
        color_fix: str,
        output_type: str,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuse arguments that cannot work, each with what was given, what is expected and what to do.

        Raises:
            ValueError: a value is out of range or two arguments exclude each other.
        """
        if image is None:
            raise ValueError("image=None is given, expected a picture: PIL image, array, tensor, or a list of them")
        if not math.isfinite(w) or w < 0:
            raise ValueError(
                f"w={w} is given, expected a number from 0 (realism) to 1 (fidelity); above 1 extrapolates"
            )
        if w > 0 and self.cfw is None:
            raise ValueError(f"w={w} needs the component cfw, which this pipeline lacks; give w=0 or load a cfw")
        if scale is not None and (height is not None or width is not None):
            raise ValueError("scale and height/width exclude each other; give one of them")
        if (height is None) != (width is None):
            raise ValueError(f"height={height}, width={width}: give both, or scale")
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale} is given, expected a positive number")
        if height is not None and width is not None and (height < 1 or width < 1):
            raise ValueError(f"height={height}, width={width} is given, expected at least one pixel each")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} is given, expected at least 1")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} is given, expected at least 1")
        if not (start in ("lq", "noise") or (isinstance(start, int) and start >= 0)):
            raise ValueError(f"start={start!r} is given, expected 'lq', 'noise' or a timestep")
        if color_fix not in get_args(ColorFix):
            raise ValueError(f"color_fix={color_fix!r} is given, expected one of {get_args(ColorFix)}")
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type!r} is given, expected one of {get_args(OutputType)}")
        for text in (prompt, negative_prompt):
            if text is not None and not isinstance(text, str | list):
                raise ValueError(f"a prompt {text!r} is given, expected text or a list of texts")
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("prompt and prompt_embeds exclude each other; give one of them")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds exclude each other; give one of them")
        unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={unknown} are unknown, "
                f"expected some of {self._callback_tensor_inputs}"
            )

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

        No prompt means the empty one: its embedding comes from the text encoder, so that LoRA layers and new tokens
        count, or, if there is none, from the adapter. The second is None without guidance.

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
        texts = [prompt or ""] if not isinstance(prompt, list) else prompt
        tokens = self.tokenizer(
            self.maybe_convert_prompt(texts, self.tokenizer),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        if lora_scale is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            outputs = self.text_encoder(
                tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device) if with_mask else None,
                output_hidden_states=clip_skip is not None,
            )
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
        if clip_skip is None:
            return outputs[0]
        # transformers 5 moved the tower one level up
        tower: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
        return tower.final_layer_norm(outputs.hidden_states[-(clip_skip + 1)])

    def upsample(
        self, image: Tensor, scale: float | None = None, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """The image resized bicubically to the result's size: scale times its own (default 4), or height x width."""
        if height is None or width is None:
            scale = 4.0 if scale is None else scale
            height, width = (max(round(side * scale), 1) for side in image.shape[-2:])
        if (height, width) == tuple(image.shape[-2:]):
            return image
        shrinks = height < image.shape[-2] or width < image.shape[-1]
        return F.interpolate(image, (height, width), mode="bicubic", antialias=shrinks).clamp(-1, 1)

    def pad(self, image: Tensor) -> Tensor:
        """The image continued by reflection to a size that every level of the networks divides evenly.

        At least two positions per side are left at the deepest level: group norms have nothing to measure on one.
        """
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        smallest = max(self.config.min_size_px, 2 * multiple)
        return pad_to(image, *(math.ceil(max(side, smallest) / multiple) * multiple for side in image.shape[-2:]))

    def encode_image(
        self,
        image: Tensor,
        generator: Generators = None,
        with_features: bool = True,
        num_images_per_prompt: int = 1,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """LQ latents (B * num_images_per_prompt, C, h, w), samples of the posterior, and the features CFW needs.

        image: (B, 3, H, W) in [-1, 1], H and W as `pad` makes them. The features, level -> (B, C, h, w), are the
        encoder's; none without cfw or on request.
        """
        levels = tuple(self.cfw.config.levels) if with_features and self.cfw is not None else ()
        with self._vae_in_safe_precision():
            posterior, features = encode_with_features(self.vae, image.to(self.vae.dtype), levels)
            moments = posterior.parameters.repeat_interleave(num_images_per_prompt, dim=0)
            z = DiagonalGaussianDistribution(moments).sample(generator)
        return to_latent(z, self.vae).to(self.unet.dtype), features

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

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor | int,
        lq_latents: Tensor,
        prompt_embeds: Tensor,
        guidance_scale: float = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """What the steered UNet predicts at one timestep, after guidance; epsilon or v as it was trained.

        latents, lq_latents: (B, C, h, w). prompt_embeds: (B, tokens, channels), or (1, ...) for all, or (2B, ...) with
        the negative ones first, which turns guidance on. The adapter runs once for both.
        """
        sft = self.adapter(lq_latents.to(self.adapter.dtype), timestep).to(self.unet.dtype)
        branches = max(len(prompt_embeds) // len(latents), 1)
        prediction = self.unet(
            torch.cat([latents] * branches),
            timestep,
            encoder_hidden_states=prompt_embeds.expand(branches * len(latents), -1, -1),
            cross_attention_kwargs=cross_attention_kwargs,
            sft=sft,
            return_dict=False,
        )[0]
        if branches == 1:
            return prediction
        uncond, cond = prediction.chunk(2)
        return classifier_free_guidance(uncond, cond, guidance_scale)

    def decode_latents(self, latents: Tensor, features: dict[int, Tensor], w: float) -> Tensor:
        """Image (B, 3, H, W), about [-1, 1], of latents (B, C, h, w); `features` of `encode_image` unless w is 0.

        Raises:
            FloatingPointError: the UNet or the decoder overflowed.
        """
        with self._vae_in_safe_precision():
            z = from_latent(latents.to(self.vae.dtype), self.vae)
            if w == 0 or self.cfw is None:
                image = self.vae.decode(z, return_dict=False)[0]
            else:
                copies = len(z) // len(next(iter(features.values())))
                features = {k: v.repeat_interleave(copies, dim=0) for k, v in features.items()}
                image = decode_with_features(self.vae, self.cfw, z, features, w)
        if not torch.isfinite(image).all():
            raise FloatingPointError(
                f"the restored picture is not finite, computed in {self.unet.dtype} and decoded in {self.vae.dtype}; "
                "load the pipeline in bfloat16 or float32"
            )
        return image.float()

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

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the UNet for the negative prompt as well."""
        return self._guidance_scale > 1

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
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; a callback sets it through `_interrupt`."""
        return self._interrupt

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
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the signature of diffusers
    ) -> StableSRPipelineOutput | tuple[Any]:
        r"""Restore pictures.

        Args:
            image: the LQ picture or pictures (all of one size), of any height and width: PIL images, arrays (H, W, 3)
                or tensors (3, H, W), uint8 or float in [0, 1].
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
            prompt_embeds, negative_prompt_embeds: text embeddings instead of prompts, one or one per picture.
            output_type: "pil", "np", "pt", or "latent" for the undecoded latents.
            return_dict: False returns a tuple.
            cross_attention_kwargs: passed to the attention processors; "scale" weighs LoRA layers.
            clip_skip: layers of the text encoder to skip.
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
        )
        self._guidance_scale = guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Bring the picture to the result's size, on a canvas that the networks can halve evenly
        lq_image = self.upsample(to_image(image).to(device), scale, height, width)
        batch_size = batch_size_of(lq_image, prompt, prompt_embeds)
        lq_image = lq_image.expand(batch_size, -1, -1, -1)
        canvas = self.pad(lq_image)

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
        prompt_embeds = expand_batch(prompt_embeds, batch_size, num_images_per_prompt)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = expand_batch(negative_prompt_embeds, batch_size, num_images_per_prompt)
            if negative_prompt_embeds.shape != prompt_embeds.shape:
                raise ValueError(
                    f"prompt_embeds of shape {tuple(prompt_embeds.shape[1:])} and negative_prompt_embeds of shape "
                    f"{tuple(negative_prompt_embeds.shape[1:])} are given; give both, padded to one length"
                )
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        # 4. Encode the picture
        with_features = w > 0 and output_type != "latent"
        lq_latents, features = self.encode_image(canvas, generator, with_features, num_images_per_prompt)

        # 5. Choose the timesteps and the latent to start from
        kept_timesteps = self.get_timesteps(num_inference_steps, device, start, timesteps, sigmas)
        latents = self.prepare_latents(lq_latents, kept_timesteps, start, generator, latents)

        # 6. Denoise
        step_kwargs = {"generator": generator, "eta": eta}
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {key: value for key, value in step_kwargs.items() if key in accepted}
        self._num_timesteps = len(kept_timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(kept_timesteps):
                if self.interrupt:
                    continue
                model_input = self.scheduler.scale_model_input(latents, t)
                prediction = self.predict(
                    model_input, t, lq_latents, prompt_embeds, self.guidance_scale, cross_attention_kwargs
                )
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
                progress_bar.update()

        # 7. Decode, cut the canvas back to the picture, give it the input's colours
        if output_type == "latent":
            images = latents
        else:
            restored = self.decode_latents(latents, features, w)[..., : lq_image.shape[-2], : lq_image.shape[-1]]
            restored = apply_color_fix(restored, lq_image.repeat_interleave(num_images_per_prompt, dim=0), color_fix)
            images = self.image_processor.postprocess(restored, output_type=output_type)

        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=images) if return_dict else (images,)


def batch_size_of(image: Tensor, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
    """Number of pictures times prompts of a call: one of the two may be single and then serves all of the other.

    Raises:
        ValueError: several pictures and another number of prompts.
    """
    prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
    if len(image) != prompts and 1 not in (len(image), prompts):
        raise ValueError(f"{prompts} prompts are given for {len(image)} pictures; give one, or one per picture")
    return max(len(image), prompts)


def expand_batch(embeds: Tensor, batch_size: int, num_images_per_prompt: int) -> Tensor:
    """Embeddings (batch_size, tokens, channels), of one prompt for all results or of one per picture.

    embeds: as `encode_prompt` returns them, `num_images_per_prompt` rows per prompt.

    Raises:
        ValueError: another number of prompts.
    """
    if len(embeds) not in (num_images_per_prompt, batch_size):
        prompts, pictures = len(embeds) // num_images_per_prompt, batch_size // num_images_per_prompt
        raise ValueError(f"{prompts} prompts are given for {pictures} pictures; give one, or one per picture")
    return embeds.repeat(batch_size // len(embeds), 1, 1)
