"""Train the adapter, StableSR's time-aware encoder and SFT layers, on a frozen UNet (Wang et al. 2023, stage 1).

    accelerate launch training/train_stablesr.py --config configs/official/stablesr_512.yaml --train_data_dir DATA

The pairs are photographs that are degraded and encoded on the fly, or latents from cache_latents.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from stablesr_kit.checkpoints.base import base_of_folder
from stablesr_kit.checkpoints.networks import embed_empty_prompt
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.steering import make_steerable
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.spaces import image_to_pixels, to_latent, unit_to_image
from stablesr_kit.training.data.batches import Share
from stablesr_kit.training.data.computed import CachedLatents
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, report_skipped
from stablesr_kit.training.data.pairs import DegradedCrops, PairedCrops, PairQueueOptions, QueuedDegradation, open_pairs
from stablesr_kit.training.losses.denoising import DenoisingOptions, denoising_task, enable_xformers, noise_schedule
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import Example, RestorationValidationOptions, restoration_examples
from stablesr_kit.training.small import build_small_adapter


@dataclass(frozen=True, kw_only=True)
class StableSRConfig(DenoisingOptions, PairQueueOptions, RestorationValidationOptions, RunConfig):
    """Options of this program."""

    pretrained_model: str | None = None
    """Folder of a Stable Diffusion pipeline, which gives UNet, autoencoder, empty prompt and prediction type."""
    pretrained_unet: str | None = None
    """Folder of the UNet, instead of pretrained_model."""
    pretrained_vae: str | None = None
    """Folder of the autoencoder, instead of pretrained_model; not needed with cached latents."""
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What the UNet of pretrained_unet predicts."""
    pretrained_adapter: str | None = None
    """Folder of an adapter to start from; None builds an untrained one."""
    adapter_channels: tuple[int, ...] | None = (64, 96, 128)
    """Widths of the encoder of an untrained small adapter; None builds the published size."""
    latents: str | None = None
    """File written by cache_latents.py; None degrades and encodes photographs on the fly."""
    latent_crop: int = 32
    """Side of the square crops of cached latents."""
    validation_inference_steps: int = 50
    """Denoising steps of a validation picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pretrained_model is None) == (self.pretrained_unet is None):
            raise ConfigError("give either pretrained_model or pretrained_unet")
        if self.latents is None and self.pretrained_model is None and self.pretrained_vae is None:
            raise ConfigError("give latents, or pretrained_vae to encode photographs with")
        if self.validation_steps and self.pretrained_model is None and self.pretrained_vae is None:
            raise ConfigError("validation_steps needs pretrained_vae, to decode the pictures with")


def main(config: StableSRConfig) -> None:
    """Train, write checkpoints, and save the averaged adapter to output_dir/adapter."""
    run = TrainingRun(config)
    data = open_data(config, run.share)
    queue = None
    if isinstance(data, RandomCrops):
        queue = QueuedDegradation(config, config.seed, config.train_batch_size, run.accelerator)
    unet, vae, schedule, no_text = frozen_parts(config)
    make_steerable(unet)
    vae = vae if config.latents is None or config.validation_steps else None

    # only the adapter is trained, through the UNet
    if config.pretrained_adapter is not None:
        adapter = load_network(StableSRAdapter, config.pretrained_adapter, "pretrained_adapter")
    elif config.adapter_channels is not None:
        adapter = build_small_adapter(unet, config.adapter_channels)
    else:
        adapter = StableSRAdapter.from_unet(unet)
    if no_text is not None:
        adapter.empty_prompt_embeds = no_text
    no_text = adapter.empty_prompt_embeds.to(run.accelerator.device, run.frozen_dtype)
    unet.requires_grad_(False).eval().to(run.accelerator.device, run.frozen_dtype, memory_format=torch.channels_last)
    adapter.train().to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        adapter.enable_gradient_checkpointing()
    enable_xformers(config, unet, adapter)
    if vae is not None:  # it encodes photographs, and decodes validation pictures
        vae.requires_grad_(False).eval().to(run.accelerator.device, memory_format=torch.channels_last)
    adapt = run.train(adapter, {"adapter": ""})

    def restored(adapter: StableSRAdapter, example: Example) -> Tensor:
        scheduler = SpacedDDPMScheduler.from_config(schedule.config)
        pipeline = StableSRPipeline(vae, unet, adapter, scheduler, default_steps=config.validation_inference_steps)
        pipeline.set_progress_bar_config(disable=True)
        height, width = (None, None) if example.hq is None else example.hq.shape[-2:]
        generator = torch.Generator().manual_seed(config.seed)
        lq = image_to_pixels(example.lq)[0]
        return unit_to_image(pipeline(lq, height=height, width=width, generator=generator, output_type="pt").images)

    run.validate(
        config,
        "adapter",
        restoration_examples(config),
        restored,
        Quality(config.niqe_statistics, config.metric_weights),
    )

    for draws, batch in run.batches(data):
        lq, hq = batch if queue is None else queue(batch)

        # photographs become latents, samples of their posterior
        if vae is not None and config.latents is None:
            with torch.no_grad(), run.accelerator.autocast():
                posterior = vae.encode(torch.cat([lq, hq]).to(memory_format=torch.channels_last)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            noise = torch.cat([draws.normal(part) for part in mean.chunk(2)])
            lq, hq = to_latent(mean + std * noise, vae).chunk(2)

        # denoise the HQ latent, given the LQ latent
        task = denoising_task(hq, draws, schedule, config)
        sft = adapt(lq.to(memory_format=torch.channels_last), task.timestep).to(unet.dtype)
        with run.accelerator.autocast():
            context = no_text.expand(len(hq), -1, -1)
            prediction = unet(task.x.to(unet.dtype), task.timestep, context, timestep_cond=sft, return_dict=False)[0]
        loss = task.loss(prediction)

        run.backward(loss)
        run.update(loss=loss)

    if not isinstance(data, CachedLatents):
        report_skipped(data.crops, run.accelerator)
    run.finish({"adapter": run.averaged("adapter")})


def frozen_parts(config: StableSRConfig) -> tuple[UNet2DConditionModel, AutoencoderKL | None, Any, Any]:
    """UNet, autoencoder, noise schedule, and the embedding of the empty prompt if there is a text encoder."""
    if config.pretrained_model is not None:
        base = base_of_folder(Path(config.pretrained_model), torch.float32)
        assert base.prediction is not None  # a folder has a scheduler
        no_text = None
        if base.text_encoder is not None:
            no_text = embed_empty_prompt(base.text_encoder, base.tokenizer)
        return base.unet, base.vae, noise_schedule(base.prediction.type), no_text
    assert config.pretrained_unet is not None  # checked in __post_init__
    unet = load_network(UNet2DConditionModel, config.pretrained_unet, "pretrained_unet")
    vae = None
    if config.pretrained_vae is not None:
        vae = load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae")
    return unet, vae, noise_schedule(config.prediction_type), None


def open_data(config: StableSRConfig, share: Share) -> CachedLatents | DegradedCrops | PairedCrops | RandomCrops:
    """Pairs (lq, hq) of latents or of pictures; for the pair queue, which degrades by itself, HQ crops only."""
    if config.latents is not None:
        return CachedLatents(config.latents, config.latent_crop, config.seed)
    if config.pair_queue_size:
        crops = PhotoCrops(config, config.seed, share)
        if crops.source.is_paired:
            raise ConfigError(
                "pair_queue_size is for photographs that are degraded on the fly; leave it out for given pairs"
            )
        return RandomCrops(crops)
    return open_pairs(config, config.seed, share)


if __name__ == "__main__":
    launch(main, StableSRConfig)
