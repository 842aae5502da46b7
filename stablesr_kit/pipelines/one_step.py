"""OneStepPipeline: restore photographs in one step of a Stable Diffusion that was trained for it, or in a few."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
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
from stablesr_kit.imaging.padding import Padded
from stablesr_kit.imaging.resizing import resized
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.noise_predictor import NoisePredictor
from stablesr_kit.pipelines.checking import OutputType
from stablesr_kit.pipelines.coding import Generators, PostStage
from stablesr_kit.pipelines.pictures import Picture, as_readables, to_pil
from stablesr_kit.pipelines.planning import Planning
from stablesr_kit.pipelines.prompting import batch_size_of
from stablesr_kit.pipelines.stablesr import StableSRPipelineOutput
from stablesr_kit.tiling.autoencoder import AttentionMode, TilingMode
from stablesr_kit.tiling.latents import Aggregation, LatentTiling
from stablesr_kit.tiling.planner import TileSize, choose_tiling, tile_multiple

Tagger = Callable[[Image.Image], str | list[str]]
Prediction = Literal["epsilon", "residual"]

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


class OneStepPipeline(Planning, StableDiffusionMixin):
    """Restores and enlarges photographs with networks that were trained to do it at once: PiSA-SR (Sun et al. 2025),
    OSEDiff (Wu et al. 2024), HYPIR (Lin et al. 2025) and, in one to five steps, InvSR (Yue et al. 2025).

    The LQ latent itself is what the UNet denoises; with a noise predictor it is noised first, by what that predicts.

    Args:
        vae: the autoencoder.
        unet: the UNet, its LoRAs merged.
        scheduler: any with the noise schedule of the base; nothing but its `alphas_cumprod` is used.
        unet_pix: of PiSA-SR, with the LoRA that removes degradation and without the one that invents detail.
        noise_predictor: of InvSR.
        default_prompt: what the UNet attends to where no text is given.
        text_encoder, tokenizer: needed for texts only.
        prediction: what the UNet predicts, the noise ("epsilon") or the difference to the restored latent ("residual").
        timesteps: of a call with one step, with two, and so on; descending. None is [[999]].
        tile_px, overlap_px: side of the tiles in which a picture of more than their area is restored.
        default_color_fix: if the call names none.
        tags_format: how tags and prompt make a text; None puts a comma between them.
        min_size_px: smaller results are restored on a canvas padded to this size.
        licence: of code and weights, kept in the folder as LICENCE.txt.
    """

    model_cpu_offload_seq = "text_encoder->unet_pix->unet->vae"
    cfw = None
    _optional_components = ["unet_pix", "noise_predictor", "default_prompt", "text_encoder", "tokenizer"]

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
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)

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
        """As any pipeline; the licence lies beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.config.licence:
            (Path(save_directory) / "LICENCE.txt").write_text(f"{self.config.licence}\n", encoding="utf-8")

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
        tile_px: TileSize = "auto",
        overlap_px: int | None = None,
        tile_batch_size: int | None = None,
        vae_tile_px: int | None = None,
        vae_mode: TilingMode = "exact",
        vae_attention: AttentionMode = "global",
        canvas_folder: Path | None = None,
        record: Path | None = None,
        post_stages: Sequence[PostStage] = (),
    ) -> StableSRPipelineOutput | tuple[Any]:
        r"""Restore pictures.

        Args:
            image: the LQ picture or pictures (all of one size), as `StableSRPipeline` takes them.
            prompt: what the picture shows, one text for all or one per picture; None is the model's own text.
            tags: the same in keywords, as the model was trained with them; or what finds them, a function of the LQ
                picture. They stand before the prompt.
            scale: size of the result relative to the input, default 4.
            height, width: size of the result, instead of `scale`.
            num_inference_steps: None is the fewest the model takes; only those with a noise predictor take more.
            timesteps: of each step, descending, instead of those of `num_inference_steps`.
            lambda_pix: of PiSA-SR, how much degradation is removed; more is smoother.
            lambda_sem: of PiSA-SR, how much detail is invented. Beside lambda_pix = lambda_sem, and 0, the UNet with one
                of its LoRAs runs as well.
            color_fix: "wavelet", "adain", "ycbcr" or "none": where the result's colours come from; None is the model's.
            generator: source of all randomness, or one per picture.
            prompt_embeds: text embeddings instead of texts, one or one per picture.
            output_type: "pil", "np", "pt", "canvas", or "latent" for the undecoded latents.
            return_dict: False returns a tuple.
            tile_px: side of the tiles a large picture is restored in, in pixels of the result; "auto" takes the
                model's, and leaves pictures of no more than their area whole; "none" never tiles.
            overlap_px: what neighbouring tiles share, in pixels; None is the model's.
            post_stages: called one after the other, after the colour fix, as `stage(images, lq_images) -> images`.

        Examples:

        Returns:
            `StableSRPipelineOutput`, or a tuple whose first element is the pictures.

        Raises:
            ValueError: an argument cannot work; the message says what is expected.
        """
        # 1. Check the arguments
        color_fix = self.config.default_color_fix if color_fix is None else color_fix
        self.check_inputs(image, scale, height, width, lambda_pix, lambda_sem, color_fix, output_type)
        kept_timesteps = self.get_timesteps(num_inference_steps, timesteps)
        predict = partial(self.predict, lambda_pix=lambda_pix, lambda_sem=lambda_sem)
        device = self._execution_device

        # 2. Bring the picture to the result's size, on a canvas that the networks can halve evenly
        given = as_readables(image)
        texts = self.texts(prompt, tags, given)
        batch_size = batch_size_of(len(given), texts, prompt_embeds)
        given = given * (batch_size // len(given))
        enlarged = [self.upsample(one, scale, height, width) for one in given]
        lq, canvases, used_size = self.prepare_canvases(given, enlarged)

        # 3. Encode the text
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(texts)
        prompt_embeds = prompt_embeds.to(device, self.unet.dtype)

        # 4. Choose tiles; a tiled canvas stays on the CPU, and its noise depends on seed and position alone
        canvas_size = canvases[0].shape[1:]
        tiling = self.choose_tiling(*canvas_size, tile_px, overlap_px, tile_batch_size or 1)
        noise = autoencoder = None
        if tiling is not None:
            noise, generator = CanvasNoise.from_generator(generator, batch_size), None
        if vae_tile_px is not None or tiling is not None:
            autoencoder = self.prepare_autoencoder(
                *canvas_size, vae_tile_px or 256, vae_mode, vae_attention, canvas_folder
            )
        aggregation = Aggregation(
            (canvas_size[0] // self.vae_scale_factor, canvas_size[1] // self.vae_scale_factor),
            tiling,
            tile_multiple(self.unet),
            device,
            self.unet.dtype,
        )

        # 5. Encode the picture
        with drawing_from(noise, stage=0):
            latents, _ = self.encode_image(canvases, generator, False, 1, autoencoder, record)
        latents = latents.to("cpu" if tiling is not None else device, torch.float32)

        # 6. Noise it, where the model is made for that
        if self.noise_predictor is not None:
            predicted = self.predict_noise(lq, kept_timesteps[0], aggregation, prompt_embeds)
            with drawing_from(noise, stage=1):
                latents = self.noised(latents, predicted.sample(generator).to(latents), kept_timesteps[0])

        # 7. Denoise
        with self.progress_bar(total=aggregation.count(range(len(kept_timesteps)))) as progress_bar:
            for i, t in enumerate(kept_timesteps):
                predicting = partial(predict, timestep=t)
                prediction = aggregation.predict(
                    predicting, latents, latents, prompt_embeds, i, on_tile=progress_bar.update
                )
                x0 = self.denoised(latents, prediction, t)
                later = kept_timesteps[i + 1 : i + 2]
                latents = self.noised(x0, prediction, later[0]) if later else x0

        # 8. Decode, cut the canvas back to the picture, give it the input's colours, let the post-stages work
        if output_type == "latent":
            images = latents
        else:
            restored = [
                color_fixed(resized(Part(one, Region(0, 0, *used_size)), *reference.shape[1:]), reference, color_fix)
                for one, reference in zip(
                    self.decode_latents(latents, [{}], 0.0, autoencoder, record), enlarged, strict=True
                )
            ]
            images = self.finish(restored, given, post_stages, output_type)

        self.maybe_free_model_hooks()
        return StableSRPipelineOutput(images=images) if return_dict else (images,)

    def prepare_canvases(
        self, given: list[Readable], enlarged: list[Readable]
    ) -> tuple[list[Readable], list[Readable], tuple[int, int]]:
        """LQ pictures, the canvases that the autoencoder takes, and what of a canvas is the picture.

        A noise predictor works at the one scale that lies between its input and the latents'. Results of another size
        are made at that scale and resized; for larger ones the input is enlarged before.
        """
        height, width = enlarged[0].shape[1:]
        if self.noise_predictor is None:
            return given, [Padded(one, *self.padded_size(height, width)) for one in enlarged], (height, width)
        working = self.working_scale
        lq_size = [max(math.ceil(side / working), own) for side, own in zip((height, width), given[0].shape[1:])]
        used_size = (lq_size[0] * working, lq_size[1] * working)
        padded_height, padded_width = self.padded_size(*used_size)
        lq: list[Readable] = [
            Padded(resized(one, *lq_size), padded_height // working, padded_width // working) for one in given
        ]
        return lq, [resized(one, padded_height, padded_width) for one in lq], used_size

    def texts(
        self, prompt: str | list[str] | None, tags: str | list[str] | Tagger | None, given: list[Readable]
    ) -> list[str] | None:
        """What is encoded, one text for all pictures or one for each; None is the model's own text."""
        if prompt is None and tags is None:
            return None
        prompts = prompt if isinstance(prompt, list) else [prompt or ""]
        if callable(tags):
            found = [tags(to_pil(one)) for one in given]
            tags = [words if isinstance(words, str) else ", ".join(words) for words in found]
        keywords = tags if isinstance(tags, list) else [tags or ""]
        count = max(len(prompts), len(keywords))
        if {len(prompts), len(keywords)} - {1, count}:
            raise ValueError(f"{len(keywords)} tags are given for {len(prompts)} prompts; give one, or one per picture")
        pairs = zip(keywords * (count // len(keywords)), prompts * (count // len(prompts)), strict=True)
        return [self._joined(*pair) for pair in pairs]

    def _joined(self, tags: str, prompt: str) -> str:
        if tags and self.config.tags_format is not None:
            return self.config.tags_format.format(tags=tags, prompt=prompt)
        return ", ".join(filter(None, (tags, prompt)))

    def encode_prompt(self, texts: list[str] | None = None) -> Tensor:
        """Embeddings (len(texts), tokens, channels); None is the model's own text, as one.

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

    def get_timesteps(self, num_inference_steps: int | None = None, timesteps: list[int] | None = None) -> list[int]:
        """Descending timesteps of the model's, for a number of steps, or those given.

        Raises:
            ValueError: the model has none for that number, or those given are none.
        """
        known = {len(one): list(one) for one in self.config.timesteps}
        if timesteps is None:
            steps = min(known) if num_inference_steps is None else num_inference_steps
            if steps not in known:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} is given, expected one of {sorted(known)}, which this "
                    "model is made for"
                )
            return known[steps]
        if num_inference_steps not in (None, len(timesteps)):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} and {len(timesteps)} timesteps exclude each other"
            )
        if self.noise_predictor is None and list(timesteps) not in known.values():
            raise ValueError(
                f"timesteps={timesteps} are given, but this model is made for {list(known.values())} alone"
            )
        end = len(self.scheduler.alphas_cumprod)
        is_descending = all(one > other for one, other in itertools.pairwise(timesteps))
        if not timesteps or not is_descending or not all(0 <= t < end for t in timesteps):
            raise ValueError(f"timesteps={timesteps} are given, expected descending ones from 0 to {end - 1}")
        return list(timesteps)

    @property
    def working_scale(self) -> int:
        """How many times larger than its input a noise predictor makes the picture."""
        return self.vae_scale_factor // 2 ** (len(self.noise_predictor.config.block_out_channels) - 1)

    def choose_tiling(
        self, height: int, width: int, tile_px: TileSize = "auto", overlap_px: int | None = None, batch_size: int = 1
    ) -> LatentTiling | None:
        """How latents of a canvas of height x width pixels are covered; None is as a whole.

        Raises:
            ValueError: the tile or the overlap cannot work; the message says what can.
        """
        factor = self.vae_scale_factor
        if tile_px == "auto":
            tile_px = "none" if height * width <= self.config.tile_px**2 else self.config.tile_px
            overlap_px = self.config.overlap_px if overlap_px is None else overlap_px
        return choose_tiling(self.unet, height // factor, width // factor, factor, tile_px, overlap_px, batch_size)

    def predict(
        self,
        latents: Tensor,
        timestep: int,
        prompt_embeds: Tensor,
        lq_latents: Tensor | None = None,  # noqa: ARG002, what is denoised is the LQ latent itself
        lambda_pix: float = 1.0,
        lambda_sem: float = 1.0,
    ) -> Tensor:
        """What the UNet predicts for latents (B, C, h, w); prompt_embeds are (B, tokens, channels) or (1, ...).

        With `unet_pix` it is lambda_pix pix + lambda_sem (both - pix), pix and both being the UNets' outputs (Sun et al.
        2025, eq. 9). What counts nothing does not run.
        """
        prompt_embeds = prompt_embeds.expand(len(latents), -1, -1)
        if self.unet_pix is None:
            return self.unet(latents, timestep, prompt_embeds, return_dict=False)[0]
        prediction = torch.zeros_like(latents)
        for unet, weight in ((self.unet_pix, lambda_pix - lambda_sem), (self.unet, lambda_sem)):
            if weight != 0:
                prediction = prediction + weight * unet(latents, timestep, prompt_embeds, return_dict=False)[0]
        return prediction

    def predict_noise(
        self, lq: list[Readable], timestep: int, aggregation: Aggregation, prompt_embeds: Tensor
    ) -> DiagonalGaussianDistribution:
        """The noise (B, C, h, w) that LQ pictures (3, H, W) are to begin with at a timestep, in the UNet's tiles."""
        fold = self.vae_scale_factor // self.working_scale
        pixels = F.pixel_unshuffle(torch.cat([assembled(one) for one in lq]), fold)  # (B, 3 fold^2, h, w)

        def predict(latents: Tensor, **_: Tensor) -> Tensor:
            image = F.pixel_shuffle(latents, fold)
            return self.noise_predictor(image.to(self.noise_predictor.dtype), timestep)

        return DiagonalGaussianDistribution(aggregation.predict(predict, pixels, pixels, prompt_embeds, 0))

    def denoised(self, latents: Tensor, prediction: Tensor, timestep: int) -> Tensor:
        """x0 of latents and what was predicted for them; schedulers of diffusers refuse one step from 999 to the end."""
        if self.config.prediction == "residual":
            return latents - prediction
        a = self.scheduler.alphas_cumprod[timestep].to(latents)
        return (latents - (1 - a).sqrt() * prediction) / a.sqrt()

    def noised(self, x0: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x0 with noise at a timestep."""
        a = self.scheduler.alphas_cumprod[timestep].to(x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def check_inputs(
        self,
        image: object,
        scale: float | None,
        height: int | None,
        width: int | None,
        lambda_pix: float,
        lambda_sem: float,
        color_fix: str,
        output_type: str,
    ) -> None:
        """Refuse arguments that cannot work, each with what was given, what is expected and what to do.

        Raises:
            ValueError: a value is out of range or two arguments exclude each other.
        """
        for name, value in (("lambda_pix", lambda_pix), ("lambda_sem", lambda_sem)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is given, expected a number of 0 or more; 1 is usual")
            if value != 1 and self.unet_pix is None:
                raise ValueError(f"{name}={value} is given, but only PiSA-SR has two strengths; leave it out")
