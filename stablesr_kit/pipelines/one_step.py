"""OneStepPipeline: restore photographs in one step, or a few, of a Stable Diffusion that was trained for it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stablesr_kit.checkpoints.networks import embed_prompt
from stablesr_kit.checkpoints.one_step import convert_one_step
from stablesr_kit.diffusion.canvas_noise import CanvasNoise, drawing_from
from stablesr_kit.imaging.canvas import Part, Readable, Region, assembled
from stablesr_kit.imaging.color_fix import ColorFix, color_fixed
from stablesr_kit.imaging.resizing import Padded, reduced, resized
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.execution import to_channels_last
from stablesr_kit.models.feature_wrapping import scale_factor
from stablesr_kit.models.noise_predictor import NoisePredictor
from stablesr_kit.pipelines.arguments import (
    check_callback_tensors,
    check_generators,
    check_output,
    check_picture,
    check_size,
    is_number,
)
from stablesr_kit.pipelines.job import Generators, Job, choose_tiles
from stablesr_kit.pipelines.loading import compile_options, resolve_model
from stablesr_kit.pipelines.pictures import (
    OutputType,
    Picture,
    PostStage,
    as_readables,
    check_finite,
    finished,
    result_size,
    to_pil,
)
from stablesr_kit.pipelines.stablesr import StableSRPipelineOutput, StepCallback
from stablesr_kit.spaces import from_latent, to_latent
from stablesr_kit.tiling import latents as latent_tiles
from stablesr_kit.tiling.autoencoder import PictureCoder, coding_bars
from stablesr_kit.tiling.latents import Aggregation, TileGrid, canvas_size, tile_multiple
from stablesr_kit.tiling.memory import Plan, Planner, Tiling
from stablesr_kit.tiling.team import Team

Tagger = Callable[[Image.Image], str | list[str]]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from stablesr_kit import OneStepPipeline

        >>> pipeline = OneStepPipeline.from_original("pisa_sr.pkl", base="stable-diffusion-2-1-base")
        >>> restored = pipeline(Image.open("photo.jpg"), lambda_sem=0.7).images[0]
        >>> restored.save("restored.png")
        ```
"""


class OneStepPipeline(DiffusionPipeline, StableDiffusionMixin):
    """Restores and enlarges photographs with networks that were trained for one step: PiSA-SR (Sun et al. 2025),
    OSEDiff (Wu et al. 2024), HYPIR (Lin et al. 2025) and, in one to five steps, InvSR (Yue et al. 2025).

    The UNet denoises the LQ latent itself. With a noise predictor, the predicted noise is added first.

    Args:
        vae: the autoencoder.
        unet: the UNet, its LoRAs merged.
        scheduler: any with the noise schedule of the base; only its `alphas_cumprod` is used.
        unet_pix: for PiSA-SR, the UNet with only the LoRA that removes degradation.
        noise_predictor: for InvSR.
        default_prompt: text embedding for calls without text.
        text_encoder, tokenizer: needed for texts only.
        prediction: what the UNet predicts, the noise ("epsilon") or the difference to the restored latent ("residual").
        timesteps: descending lists, for each number of steps that a call may ask for. None is [[999]].
        tile_px, overlap_px: of the tiles, which are used for pictures larger than one tile.
        default_color_fix: of a call that gives none.
        tags_format: format string that combines tags and prompt; None joins them with a comma.
        min_size_px: smaller results are restored on a canvas padded to this size.
        margin_px, working_scale: as of `StableSRPipeline`; the margin is a multiple of 8 for models with a noise
            predictor.
        licence: of code and weights, kept in the folder as LICENCE.txt.
    """

    model_cpu_offload_seq = "text_encoder->unet_pix->unet->vae"
    _optional_components = ["unet_pix", "noise_predictor", "default_prompt", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    _num_timesteps: int
    _interrupt: bool
    aggregation: Aggregation  # of the running or last call; its grid may have been halved for lack of memory
    coder: PictureCoder  # likewise, with the tiles of the autoencoder

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        unet_pix: UNet2DConditionModel | None = None,
        noise_predictor: NoisePredictor | None = None,
        default_prompt: DefaultPrompt | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        prediction: str = "epsilon",
        timesteps: list[list[int]] | None = None,
        tile_px: int = 512,
        overlap_px: int = 256,
        default_color_fix: str = "adain",
        tags_format: str | None = None,
        min_size_px: int = 0,
        licence: str = "",
        margin_px: int = 0,
        working_scale: int | float = 0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            unet_pix=unet_pix,
            noise_predictor=noise_predictor,
            default_prompt=default_prompt,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            prediction=prediction,
            timesteps=timesteps or [[999]],
            tile_px=tile_px,
            overlap_px=overlap_px,
            default_color_fix=default_color_fix,
            tags_format=tags_format,
            min_size_px=min_size_px,
            licence=licence,
            margin_px=margin_px,
            working_scale=working_scale,
        )
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder that `stablesr convert` or `save_pretrained` made, or a repository of the Hugging Face hub.

        Keyword arguments as `DiffusionPipeline.from_pretrained`. To load less: text_encoder=None, tokenizer=None if no
        text will be given; unet_pix=None if PiSA-SR's strengths stay 1.

        Raises:
            ModelNotFoundError: there is no such model here or on the hub.
        """
        pipeline = super().from_pretrained(
            str(resolve_model(pretrained_model_name_or_path, embedded={}, **kwargs)), **kwargs
        )
        for network in (pipeline.vae, pipeline.unet, pipeline.unet_pix, pipeline.noise_predictor):
            if network is not None:
                to_channels_last(network)
        return pipeline

    @classmethod
    def from_original(cls, checkpoint: str | Path, base: str | Path, **kwargs: Any) -> Self:
        """Build a pipeline from a released file and its Stable Diffusion; keyword arguments as `convert_one_step`.

        Raises:
            CheckpointError: the file is of another family, the base is another one, or a tensor is missing, left over
                or of another shape.
            UnsafeCheckpointError: a file would run code.
        """
        return cls(**convert_one_step(checkpoint, base, **kwargs))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in any pipeline; the licence is saved as LICENCE.txt."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.config.licence:
            (Path(save_directory) / "LICENCE.txt").write_text(f"{self.config.licence}\n", encoding="utf-8")

    def check_strengths(self, lambda_pix: float, lambda_sem: float) -> None:
        """Refuse strengths of PiSA-SR that cannot work with this model. Raises ValueError."""
        for name, value in (("lambda_pix", lambda_pix), ("lambda_sem", lambda_sem)):
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name}={value!r} is given, expected a number from 0; 1 is usual")
        if lambda_pix != 1 or lambda_sem != 1:
            if self.config.prediction != "residual":
                raise ValueError(
                    "lambda_pix and lambda_sem are strengths of PiSA-SR, which this is not; leave them out"
                )
            if lambda_pix != lambda_sem and self.unet_pix is None:
                raise ValueError("lambda_pix other than lambda_sem needs the component unet_pix; load it")

    def texts(
        self, prompt: str | list[str] | None, tags: str | list[str] | Tagger | None, lq: list[Readable]
    ) -> list[str] | None:
        """The texts to encode, one for all pictures or one each; None is the default prompt.

        Raises:
            ValueError: prompts or tags are no texts, or their numbers differ.
        """
        for name, text in (("prompt", prompt), ("tags", tags)):
            if not (text is None or isinstance(text, str | list) or (name == "tags" and callable(text))):
                raise ValueError(f"{name} of type {type(text).__name__} are given, expected text or a list of texts")
        if prompt is None and tags is None:
            return None
        prompts = prompt if isinstance(prompt, list) else [prompt or ""]
        if callable(tags):
            found = [tags(to_pil(one)) for one in lq]
            tags = [words if isinstance(words, str) else ", ".join(words) for words in found]
        keywords = tags if isinstance(tags, list) else [tags or ""]
        count = max(len(prompts), len(keywords))
        if {len(prompts), len(keywords)} - {1, count}:
            raise ValueError(f"{len(keywords)} tags are given for {len(prompts)} prompts; give one, or one per picture")
        pairs = zip(keywords * (count // len(keywords)), prompts * (count // len(prompts)), strict=True)
        return [self._text(*pair) for pair in pairs]

    def _text(self, tags: str, prompt: str) -> str:
        if tags and self.config.tags_format is not None:
            return self.config.tags_format.format(tags=tags, prompt=prompt)
        return ", ".join(filter(None, (tags, prompt)))

    def encode_prompt(self, texts: list[str] | None = None) -> Tensor:
        """Embeddings (len(texts), tokens, channels); for None those (1, tokens, channels) of the default prompt.

        Raises:
            ValueError: there is a text but no text encoder and tokenizer.
        """
        if texts is None and self.default_prompt is not None:
            return self.default_prompt.embeds
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"the text {(texts or [''])[0]!r} needs the components text_encoder and tokenizer, which this pipeline "
                "lacks; load them, or give prompt_embeds"
            )
        return torch.cat([embed_prompt(text, self.text_encoder, self.tokenizer) for text in texts or [""]])

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas for a result of height x width and its margin, see `canvas_size`."""
        return canvas_size(
            self.unet, height, width, self.vae_scale_factor, self.config.min_size_px, self.config.margin_px
        )

    def get_timesteps(self, num_inference_steps: int | None = None, timesteps: list[int] | None = None) -> list[int]:
        """Descending timesteps: the model's for a number of steps, or the given ones.

        Raises:
            ValueError: the model was not made for that number or those timesteps.
        """
        known = {len(one): list(one) for one in self.config.timesteps}
        if timesteps is None:
            steps = min(known) if num_inference_steps is None else num_inference_steps
            if steps not in known:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} is given, expected one of {sorted(known)}, which this "
                    "model was made for"
                )
            return known[steps]
        if num_inference_steps not in (None, len(timesteps)):
            raise ValueError("num_inference_steps and timesteps exclude each other; give one of them")
        if self.noise_predictor is None and list(timesteps) not in known.values():
            raise ValueError(
                f"timesteps={timesteps} are given, but this model was made for {known[min(known)]}; leave them out"
            )
        end = len(self.scheduler.alphas_cumprod)
        is_descending = all(one > other for one, other in itertools.pairwise(timesteps))
        if not timesteps or not is_descending or not all(0 <= t < end for t in timesteps):
            raise ValueError(f"timesteps={timesteps} are given, expected descending ones from {end - 1} to 0")
        return list(timesteps)

    def predict(
        self,
        latents: Tensor,
        timestep: int,
        prompt_embeds: Tensor,
        lq_latents: Tensor | None = None,  # noqa: ARG002, the LQ latent itself is what is denoised
        image_embeds: Sequence[Tensor] = (),  # noqa: ARG002, no IP adapter was trained with these models
        lambda_pix: float = 1.0,
        lambda_sem: float = 1.0,
    ) -> Tensor:
        """What the UNet predicts for latents (B, C, h, w); prompt_embeds are (B, tokens, channels) or (1, ...).

        PiSA-SR's residual is lambda_pix * pix + lambda_sem * (both - pix), where pix and both are predicted with one
        and with both LoRAs. A UNet whose weight is 0 does not run.
        """
        prompt_embeds = prompt_embeds.expand(len(latents), -1, -1)
        if self.config.prediction != "residual":
            return self.unet(latents, timestep, prompt_embeds, return_dict=False)[0]
        residual = torch.zeros_like(latents)
        for unet, strength in ((self.unet_pix, lambda_pix - lambda_sem), (self.unet, lambda_sem)):
            if strength != 0:
                residual = residual + strength * unet(latents, timestep, prompt_embeds, return_dict=False)[0]
        return residual

    def compile_prediction(self, **options: Any) -> None:
        """As in `StableSRPipeline`; compiles the UNet, or both UNets."""
        for unet in (self.unet, self.unet_pix):
            if unet is not None:
                unet.compile(**compile_options(self._execution_device, **options))

    def predict_noise(
        self,
        images: Sequence[Readable],
        height: int,
        width: int,
        timestep: int,
        grid: TileGrid | None,
        prompt_embeds: Tensor,
    ) -> DiagonalGaussianDistribution:
        """Posterior of the noise (B, C, h, w) to add to the LQ latents at a timestep, predicted in tiles.

        The network sees the pictures (3, H, W) at a quarter of the result's height x width: their own size for scale 4.
        The pixels of a latent position are folded into channels, so that pixels and latents have the same tiles.
        """
        fold = self.noise_predictor.factor
        scale = self.vae_scale_factor // fold
        canvas_height, canvas_width = (side // scale for side in self.padded_size(height, width))
        quarters = (resized(one, math.ceil(height / scale), math.ceil(width / scale)) for one in images)
        margin = self.config.margin_px // scale
        lq = torch.cat([assembled(Padded(one, canvas_height, canvas_width, margin)) for one in quarters])
        pixels = F.pixel_unshuffle(lq, fold)  # (B, 3 fold^2, h, w)
        aggregation = Aggregation(
            (pixels.shape[-2], pixels.shape[-1]),
            grid,
            tile_multiple(self.unet),
            self._execution_device,
            self.noise_predictor.dtype,
        )

        def predict(latents: Tensor, **_: Any) -> Tensor:
            return self.noise_predictor(F.pixel_shuffle(latents, fold), timestep)

        return DiagonalGaussianDistribution(aggregation.predict(predict, pixels, pixels, prompt_embeds, 0))

    def denoised(self, latents: Tensor, prediction: Tensor, timestep: int) -> Tensor:
        """x0 from latents and the prediction for them (Ho et al. 2020, eq. 15, or latents - residual)."""
        if self.config.prediction == "residual":
            return latents - prediction
        a = self.scheduler.alphas_cumprod[timestep].to(latents)
        return (latents - (1 - a).sqrt() * prediction) / a.sqrt()

    def noised(self, x0: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x0 noised to a timestep; with the predicted noise this is a DDIM step (Song et al. 2021, eq. 12)."""
        a = self.scheduler.alphas_cumprod[timestep].to(x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Picture | list[Picture] | None = None,
        prompt: str | list[str] | None = None,
        tags: str | list[str] | Tagger | None = None,
        scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        lambda_pix: float = 1.0,
        lambda_sem: float = 1.0,
        color_fix: ColorFix | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        tiling: Tiling | None = None,
        job: Job | None = None,
        post_stages: Sequence[PostStage] = (),
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the signature of diffusers
    ) -> StableSRPipelineOutput | tuple[Any, ...]:
        r"""Restore pictures.

        Args:
            image: the LQ picture or pictures (all of one size), as `StableSRPipeline` takes them.
            prompt: what the picture shows, one text for all or one per picture; None is the default prompt.
            tags: keywords, which OSEDiff was trained with, one text for all or one per picture; or a function that
                returns the tags of an LQ picture. They are put before the prompt.
            scale: size of the result relative to the input, default 4.
            height, width: size of the result, instead of `scale`.
            num_inference_steps: None is the smallest number that the model supports.
            timesteps: descending custom ones, for models with a noise predictor.
            lambda_pix: PiSA-SR: how much degradation is removed; more is smoother.
            lambda_sem: PiSA-SR: how much detail is added. If it differs from lambda_pix and is not 0, the UNet runs
                twice.
            color_fix: "wavelet", "adain", "ycbcr" or "none": where the result's colours come from; None is the model's.
            generator: source of all randomness, or one per picture.
            prompt_embeds: text embeddings instead of texts, one or one per picture.
            output_type: "pil", "np", "pt", "canvas", or "latent" for the undecoded latents.
            return_dict: False returns a tuple.
            tiling: tiles, memory and disk for large pictures; None chooses automatically. "auto" takes the model's own
                tiles for pictures larger than one tile.
            job: for calls that are resumed or shared by processes.
            post_stages: called one after the other, after the colour fix, as `stage(images, lq_images) -> images`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in any pipeline.

        Examples:

        Returns:
            `StableSRPipelineOutput`, or a tuple whose first element is the pictures.

        Raises:
            ValueError: an argument cannot work; the message says what is expected.
        """
        # 1. Check the arguments
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        color_fix = color_fix or self.config.default_color_fix
        check_picture(image)
        check_size(scale, height, width)
        check_output(color_fix, output_type, post_stages)
        if prompt_embeds is not None and (prompt is not None or tags is not None):
            raise ValueError("prompt_embeds and prompt or tags exclude each other; give one of them")
        self.check_strengths(lambda_pix, lambda_sem)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        kept_timesteps = self.get_timesteps(num_inference_steps, timesteps)
        tiling, job = tiling or Tiling(), job or Job()
        self._interrupt = False
        self._num_timesteps = len(kept_timesteps)
        device = self._execution_device

        # 2. Encode the texts
        given = as_readables(image)
        texts = self.texts(prompt, tags, given)
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(texts)
        prompt_embeds = prompt_embeds.to(device, self.unet.dtype)
        batch_size = max(len(given), len(prompt_embeds))
        if {len(given), len(prompt_embeds)} - {1, batch_size}:
            raise ValueError(
                f"{len(prompt_embeds)} texts are given for {len(given)} pictures; give one, or one per picture"
            )
        check_generators(generator, batch_size)

        # 3. Bring the picture to the result's size, on a canvas that the networks can halve evenly
        given = given * (batch_size // len(given))
        lq_px = given[0].shape[1], given[0].shape[2]
        result_px = (height, width) if height and width else result_size(*lq_px, scale)
        size = tiling.working_size(lq_px, result_px, self.config.working_scale)
        enlarged = [resized(one, *size) for one in given]
        margin = self.config.margin_px
        canvases = [Padded(one, *self.padded_size(*size), margin) for one in enlarged]

        # 4. Choose tiles; a tiled canvas stays on the CPU, and its noise depends on seed and position alone
        grid, vae_tile_px = choose_tiles(
            self, *size, tiling, job, num_inference_steps=len(kept_timesteps), batch_size=batch_size
        )
        if job.state is not None and job.state.grid is not None:
            grid = TileGrid(**job.state.grid)
        noise = job.noise
        if grid is not None and noise is None:
            noise = CanvasNoise.from_generator(generator, batch_size)
        generator = generator if noise is None else None
        progress = job.progress or coding_bars(getattr(self, "_progress_bar_config", {}))
        self.coder = tiling.coder(self.vae, None, vae_tile_px, progress)

        # 5. Encode the picture, and noise it where the model was made for that
        moments, _ = self.coder.encode(canvases, (), job.record)
        moments = moments.to("cpu" if grid is not None else device, torch.float32)
        with drawing_from(noise, stage=0):
            latents = to_latent(DiagonalGaussianDistribution(moments).sample(generator), self.vae)
        if self.noise_predictor is not None:
            predicted = self.predict_noise(given, *size, kept_timesteps[0], grid, prompt_embeds)
            with drawing_from(noise, stage=1):
                latents = self.noised(latents, predicted.sample(generator).to(latents), kept_timesteps[0])
        first_step = 0
        if job.state is not None:
            latents, first_step = job.state.restore(latents, self.scheduler, generator), job.state.step

        # 6. Denoise
        self.aggregation = aggregation = Aggregation(
            (latents.shape[-2], latents.shape[-1]),
            grid,
            tile_multiple(self.unet),
            device,
            self.unet.dtype,
            team=job.team if grid is not None else None,
        )
        parts = aggregation.count(range(first_step, self._num_timesteps))
        with (
            job.progress("sampling", parts, "step") if job.progress else self.progress_bar(total=parts) as progress_bar
        ):
            aggregation.show_on(progress_bar, range(first_step, self._num_timesteps))
            for i, t in enumerate(kept_timesteps):
                if self.interrupt or i < first_step:
                    continue
                prediction = aggregation.predict(
                    partial(self.predict, timestep=t, lambda_pix=lambda_pix, lambda_sem=lambda_sem),
                    latents,
                    latents,
                    prompt_embeds,
                    i,
                    on_tile=progress_bar.update,
                    on_halving=partial(aggregation.show_on, progress_bar, range(i, self._num_timesteps)),
                )
                if job.on_prediction is not None:
                    prediction = job.on_prediction(prediction, latents, torch.tensor(t), i)
                latents = self.denoised(latents, prediction, t)
                if i + 1 < len(kept_timesteps):
                    latents = self.noised(latents, prediction, kept_timesteps[i + 1])

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    asked = {key: tensors[key] for key in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, asked)
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)

        # 7. Decode, cut the canvas back to the picture, give it the input's colours, let the post-stages work
        if output_type == "latent":
            images: Any = latents
        else:
            decoded = self.coder.decode(from_latent(latents, self.vae), [{}], 0.0, job.record)
            check_finite(decoded, self.unet.dtype, self.vae.dtype)
            inside = Region(margin, margin, margin + size[0], margin + size[1])
            restored = [
                color_fixed(Part(image, inside), reference, color_fix)
                for image, reference in zip(decoded, enlarged, strict=True)
            ]
            restored = [reduced(one, *result_px) for one in restored]
            images = finished(restored, given, post_stages, output_type, self.image_processor, job.is_grey)
        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=images) if return_dict else (images,)

    def plan(
        self,
        height: int,
        width: int,
        *,
        num_inference_steps: int | None = None,
        batch_size: int = 1,
        tiling: Tiling | None = None,
    ) -> Plan:
        """What a call with these arguments will do, the most memory it will hold on the device, and for how long.

        height, width: of the result, in pixels, or what it is made at, see `Tiling.working_size`. The others as in the
        call, which takes the plan as `Job(plan=...)`. What is chosen how, and what is raised: `Planner.plan`. PiSA-SR
        is planned with one UNet running; a noise predictor's work, less than a step, is not counted.
        """
        others = [one for one in (self.unet_pix, self.noise_predictor, self.text_encoder) if one is not None]
        canvas = self.padded_size(height, width)
        return Planner(self.vae, self.unet, others=others).plan(
            *canvas,
            self._with_own_tiles(*canvas, tiling or Tiling()),
            self._execution_device,
            steps=len(self.get_timesteps(num_inference_steps)),
            pictures=batch_size,
            margin_px=self.config.margin_px,
        )

    def needs_plan(self, height: int, width: int, tiling: Tiling) -> bool:
        """Whether `plan`, which takes a second or two, has anything to decide for a result of height x width pixels."""
        return tiling.leaves_choice(self.grid_of(height, width, tiling), self._execution_device)

    def grid_of(self, height: int, width: int, tiling: Tiling) -> TileGrid | None:
        """Tiles of latents for a result of height x width pixels if memory does not matter; None: no tiles."""
        canvas = self.padded_size(height, width)
        factor = self.vae_scale_factor
        own = self._with_own_tiles(*canvas, tiling)
        return own.grid(self.unet, canvas[0] // factor, canvas[1] // factor, factor, self.config.margin_px // factor)

    def _with_own_tiles(self, height: int, width: int, tiling: Tiling) -> Tiling:
        """The tiling with the model's own tiles for a canvas of height x width, instead of "auto"."""
        if tiling.tile_px != "auto":
            return tiling
        margins = 2 * self.config.margin_px  # which are no reason for tiles
        if (height - margins) * (width - margins) <= self.config.tile_px**2:
            return replace(tiling, tile_px="none")
        overlap_px = self.config.overlap_px if tiling.overlap_px is None else tiling.overlap_px
        return replace(tiling, tile_px=self.config.tile_px, overlap_px=overlap_px)

    @torch.no_grad()
    def assist(self, team: Team) -> None:
        """Predict tiles for the first process of a team, which calls its pipeline with it, until it ends the call.

        Raises:
            Exception: this process's own error, raised after the first process has stopped.
        """
        latent_tiles.assist(team, self.predict, self._execution_device, self.unet.dtype)

    @property
    def default_steps(self) -> int:
        """Steps of a call that gives no number."""
        return len(self.get_timesteps())

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; a callback sets it through `_interrupt`."""
        return self._interrupt
