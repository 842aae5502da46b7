"""Train the adapter, StableSR's time-aware encoder and SFT layers, on a frozen UNet (Wang et al. 2023, stage 1).

    accelerate launch training/train_stablesr.py --config configs/mini/stablesr.yaml

Pairs are degraded on the fly from photographs and encoded, or read from the latents of cache_latents.py.
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm import tqdm

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.sft_unet import SFTUNet2DConditionModel
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.spaces import to_latent
from stablesr_kit.training.config import RunConfig, load_config
from stablesr_kit.training.pairs import CachedLatents, DegradedCrops
from stablesr_kit.training.photos import load_photos, make_loader
from stablesr_kit.training.run import (
    RunningMean,
    learning_rate,
    resume,
    save_checkpoint,
    set_learning_rate,
    start_run,
)
from stablesr_kit.training.small_unet import build_small_adapter, build_small_scheduler, stratified_timesteps

logger = logging.getLogger("train_stablesr")


@dataclass(frozen=True, kw_only=True)
class StableSRConfig(RunConfig):
    """Options of this program."""

    pretrained_unet: str
    """Folder of the UNet, which stays as it is."""
    pretrained_adapter: str | None = None
    """Folder of an adapter to start from; None builds an untrained one."""
    adapter_channels: tuple[int, ...] = (64, 96, 128)
    """Widths of an untrained adapter's encoder."""
    latents: str | None = None
    """File written by cache_latents.py; None degrades and encodes photographs on the fly."""
    latent_crop: int = 32
    """Side of the square latents of a batch, when they are cached."""
    pretrained_vae: str | None = None
    """Folder of the autoencoder, for photographs."""
    train_data_dir: str | None = None
    """Folder of photographs."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Every photograph is used once at each of these sizes."""
    resolution: int = 512
    """Side of the square crops in px, for photographs."""
    degradations: Mapping[str, float] = field(default_factory=lambda: {"stablesr-512": 1.0})
    """Names of degradations and how often each is drawn, for photographs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents is None and (self.train_data_dir is None or self.pretrained_vae is None):
            raise ConfigError("give latents, or both train_data_dir and pretrained_vae")


def main(config: StableSRConfig) -> None:
    """Train, write checkpoints, and save the averaged adapter to output_dir/adapter."""
    accelerator = start_run(config)

    # networks: only the adapter is trained, through the UNet
    unet = SFTUNet2DConditionModel.from_unet(UNet2DConditionModel.from_pretrained(config.pretrained_unet))
    unet.requires_grad_(False).eval()
    vae = None
    if config.latents is None:
        vae = AutoencoderKL.from_pretrained(config.pretrained_vae).requires_grad_(False).eval()
        vae.to(accelerator.device, memory_format=torch.channels_last)
    if config.pretrained_adapter is None:
        adapter = build_small_adapter(unet, config.adapter_channels)
    else:
        adapter = StableSRAdapter.from_pretrained(config.pretrained_adapter)
    adapter.train()
    unet.to(accelerator.device, memory_format=torch.channels_last)
    adapter = adapter.to(memory_format=torch.channels_last)
    parameters = list(adapter.parameters())
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    adapter, optimizer = accelerator.prepare(adapter, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = resume(accelerator, config)

    # data and the noise they are hidden under
    scheduler = build_small_scheduler()
    loader = accelerator.prepare(
        make_loader(
            pairs_of(config),
            config.train_batch_size,
            step=step,
            max_steps=config.max_train_steps,
            processes=accelerator.num_processes,
        )
    )
    no_text = accelerator.unwrap_model(adapter).empty_prompt_embeds
    logger.info("%d trained parameters", sum(p.numel() for p in parameters))

    losses = RunningMean()
    progress = tqdm(
        total=config.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_local_main_process
    )
    start = time.monotonic()
    for lq, hq in loader:
        set_learning_rate(optimizer, learning_rate(config, step))

        # photographs become latents, samples of their posterior
        if vae is not None:
            with torch.no_grad(), accelerator.autocast():
                z = vae.encode(torch.cat([lq, hq]).to(memory_format=torch.channels_last)).latent_dist.sample()
            lq, hq = to_latent(z.float(), vae).chunk(2)

        # hide the good latent under noise
        timestep = stratified_timesteps(len(hq), scheduler.config.num_train_timesteps, hq.device)
        noise = torch.randn_like(hq)
        x = scheduler.add_noise(hq, noise, timestep).to(memory_format=torch.channels_last)
        target = scheduler.get_velocity(hq, noise, timestep)

        # find it again with the degraded one
        with accelerator.autocast():
            sft = adapter(lq.to(memory_format=torch.channels_last), timestep)
            v = unet(x, timestep, no_text.expand(len(x), -1, -1), sft=sft, return_dict=False)[0]
        loss = F.mse_loss(v.float(), target)

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        step += 1

        losses.add(loss=loss.detach())
        progress.update()
        if step % config.logging_steps == 0:
            logger.info("step %d %s (%.0f s)", step, losses.read(), time.monotonic() - start)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)

    # the result: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        accelerator.unwrap_model(adapter).save_pretrained(Path(config.output_dir) / "adapter")


def pairs_of(config: StableSRConfig) -> Dataset[Any]:
    """Pairs (lq, hq): latents read from a file, or pictures degraded on the fly."""
    if config.latents is not None:
        return CachedLatents(config.latents, config.latent_crop, config.seed)
    photos = load_photos(str(config.train_data_dir), min_side_px=config.resolution, scales=config.photo_scales)
    return DegradedCrops(photos, config.resolution, config.degradations, config.seed)


if __name__ == "__main__":
    main(load_config(StableSRConfig, sys.argv[1:]))
