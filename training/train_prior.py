"""Train a small latent diffusion prior, together with the adapter that steers it, on cached latents.

    accelerate launch training/train_prior.py --config configs/mini/prior.yaml

Some steps leave the adapter out, so that the UNet also works without it; train_stablesr.py then freezes the UNet.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from stablesr_kit.models.steering import make_steerable
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.training.data.computed import CachedLatents
from stablesr_kit.training.losses.denoising import DenoisingOptions, denoising_task, enable_xformers, noise_schedule
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.small import build_small_adapter, build_small_unet


@dataclass(frozen=True, kw_only=True)
class PriorConfig(DenoisingOptions, RunConfig):
    """Options of this program."""

    latents: str
    """File written by cache_latents.py."""
    latent_crop: int = 32
    """Side of the square latents in a batch."""
    unconditional_every: int = 5
    """Every n-th step leaves the adapter out."""
    pretrained_unet: str | None = None
    """Folder of a UNet to start from; None builds an untrained one."""
    pretrained_adapter: str | None = None
    """Folder of an adapter to start from; None builds an untrained one."""
    block_out_channels: tuple[int, ...] = (64, 96, 160)
    """Widths of an untrained UNet."""
    adapter_channels: tuple[int, ...] = (64, 96, 128)
    """Widths of an untrained adapter's encoder."""


def main(config: PriorConfig) -> None:
    """Train, write checkpoints, and save the averaged weights to output_dir/unet and output_dir/adapter."""
    run = TrainingRun(config)
    pairs = CachedLatents(config.latents, config.latent_crop, config.seed)
    schedule = noise_schedule("v_prediction")

    if config.pretrained_unet is None:
        unet = build_small_unet(config.block_out_channels)
    else:
        unet = load_network(UNet2DConditionModel, config.pretrained_unet, "pretrained_unet")
    make_steerable(unet)
    if config.pretrained_adapter is None:
        adapter = build_small_adapter(unet, config.adapter_channels)
    else:
        adapter = load_network(StableSRAdapter, config.pretrained_adapter, "pretrained_adapter")
    for network in (unet, adapter):
        network.to(memory_format=torch.channels_last).train()
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
    enable_xformers(config, unet, adapter)
    assert adapter.empty_prompt_embeds is not None
    no_text = adapter.empty_prompt_embeds.to(run.accelerator.device)
    predict = run.train(unet, {"unet": ""})
    adapt = run.train(adapter, {"adapter": ""})

    for draws, (lq, hq) in run.batches(pairs):
        # denoise the HQ latent, given the LQ latent; some steps go without the adapter
        task = denoising_task(hq, draws, schedule, config)
        is_unconditional = run.step % config.unconditional_every == 0
        sft = None if is_unconditional else adapt(lq.to(memory_format=torch.channels_last), task.timestep)
        context = no_text.expand(len(hq), -1, -1)
        prediction = predict(task.x, task.timestep, context, timestep_cond=sft, return_dict=False)[0]
        loss = task.loss(prediction)

        run.backward(loss)
        run.update(**{"unconditional" if is_unconditional else "conditional": loss})

    run.finish({"unet": run.averaged("unet"), "adapter": run.averaged("adapter")})


if __name__ == "__main__":
    launch(main, PriorConfig)
