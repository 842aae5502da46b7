"""Train a small latent diffusion prior together with the adapter that steers it, from cached latents.

    accelerate launch training/train_prior.py --config configs/mini/prior.yaml

A share of the steps leaves the adapter out, so that the UNet remains a prior of its own; train_stablesr.py then
freezes it.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from stablesr_kit.models.sft_unet import SFTUNet2DConditionModel
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.training.config import RunConfig, load_config
from stablesr_kit.training.pairs import CachedLatents
from stablesr_kit.training.photos import make_loader
from stablesr_kit.training.run import (
    RunningMean,
    learning_rate,
    resume,
    save_checkpoint,
    set_learning_rate,
    start_run,
)
from stablesr_kit.training.small_unet import (
    build_small_adapter,
    build_small_scheduler,
    build_small_unet,
    stratified_timesteps,
)

logger = logging.getLogger("train_prior")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(RunConfig):
    """Options of this program."""

    latents: str
    """File written by cache_latents.py."""
    latent_crop: int = 32
    """Side of the square latents in a batch."""
    unconditional_every: int = 5
    """Every so many steps the adapter is left out."""
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
    accelerator = start_run(config)

    # networks: the UNet, the adapter, and the moving average of both
    if config.pretrained_unet is None:
        stock_unet = build_small_unet(config.block_out_channels)
    else:
        stock_unet = UNet2DConditionModel.from_pretrained(config.pretrained_unet)
    unet = SFTUNet2DConditionModel.from_unet(stock_unet)
    if config.pretrained_adapter is None:
        adapter = build_small_adapter(unet, config.adapter_channels)
    else:
        adapter = StableSRAdapter.from_pretrained(config.pretrained_adapter)
    unet, adapter = unet.to(memory_format=torch.channels_last), adapter.to(memory_format=torch.channels_last)
    unet.train()
    adapter.train()
    parameters = [*unet.parameters(), *adapter.parameters()]
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    unet, adapter, optimizer = accelerator.prepare(unet, adapter, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = resume(accelerator, config)

    # data and the noise they are hidden under
    scheduler = build_small_scheduler()
    pairs = CachedLatents(config.latents, config.latent_crop, config.seed)
    loader = accelerator.prepare(
        make_loader(
            pairs,
            config.train_batch_size,
            step=step,
            max_steps=config.max_train_steps,
            processes=accelerator.num_processes,
        )
    )
    no_text = accelerator.unwrap_model(adapter).empty_prompt_embeds
    logger.info("%d parameters in UNet and adapter", sum(p.numel() for p in parameters))

    losses = RunningMean()
    progress = tqdm(
        total=config.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_local_main_process
    )
    start = time.monotonic()
    for lq, hq in loader:
        set_learning_rate(optimizer, learning_rate(config, step))

        # hide the good latent under noise
        timestep = stratified_timesteps(len(hq), scheduler.config.num_train_timesteps, hq.device)
        noise = torch.randn_like(hq)
        x = scheduler.add_noise(hq, noise, timestep).to(memory_format=torch.channels_last)
        target = scheduler.get_velocity(hq, noise, timestep)

        # find it again, with the degraded one or, every few steps, without
        is_unconditional = step % config.unconditional_every == 0
        with accelerator.autocast():
            sft = None if is_unconditional else adapter(lq.to(memory_format=torch.channels_last), timestep)
            v = unet(x, timestep, no_text.expand(len(x), -1, -1), sft=sft, return_dict=False)[0]
        loss = F.mse_loss(v.float(), target)

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        step += 1

        losses.add(**{"unconditional" if is_unconditional else "conditional": loss.detach()})
        progress.update()
        if step % config.logging_steps == 0:
            logger.info("step %d %s (%.0f s)", step, losses.read(), time.monotonic() - start)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)

    # the result: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        accelerator.unwrap_model(unet).save_pretrained(Path(config.output_dir) / "unet")
        accelerator.unwrap_model(adapter).save_pretrained(Path(config.output_dir) / "adapter")


if __name__ == "__main__":
    main(load_config(PriorConfig, sys.argv[1:]))
