"""Train an autoencoder on photographs; with a discriminator, finish its decoder.

accelerate launch training/train_autoencoder.py --config configs/mini/autoencoder.yaml --train_data_dir DATA
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from stablesr_kit.training.config import RunConfig, load_config
from stablesr_kit.training.losses import reconstruction_loss
from stablesr_kit.training.photos import RandomCrops, load_photos, make_loader
from stablesr_kit.training.run import (
    RunningMean,
    learning_rate,
    resume,
    save_checkpoint,
    set_learning_rate,
    start_run,
)
from stablesr_kit.training.small_autoencoder import build_small_autoencoder, fold_latent_statistics

logger = logging.getLogger("train_autoencoder")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """Options of this program."""

    train_data_dir: str
    """Folder of photographs."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Every photograph is used once at each of these sizes."""
    favourite_photos: tuple[str, ...] = ()
    """Patterns of file names that are drawn twice as often."""
    resolution: int = 64
    """Side of the square crops in px."""
    pretrained_vae: str | None = None
    """Folder of an autoencoder to start from; None builds an untrained one."""
    block_out_channels: tuple[int, ...] = (24, 48, 96)
    """Widths of the levels of an untrained autoencoder; each level but the last halves the picture."""
    layers_per_block: int = 1
    """Residual blocks per level of an untrained autoencoder."""
    latent_channels: int = 4
    """Channels of the latent of an untrained autoencoder."""
    kl_weight: float = 1e-3
    """Weight of the posterior's divergence from a unit normal, a mean over latent elements."""


def main(config: AutoencoderConfig) -> None:
    """Train, write checkpoints, and save the averaged weights with normalised latents to output_dir/vae."""
    accelerator = start_run(config)

    # networks: the autoencoder and the moving average of its weights
    if config.pretrained_vae is None:
        vae = build_small_autoencoder(config.block_out_channels, config.latent_channels, config.layers_per_block)
    else:
        vae = AutoencoderKL.from_pretrained(config.pretrained_vae)
    vae = vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    vae, optimizer = accelerator.prepare(vae, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = resume(accelerator, config)

    # data: crops that depend on the seed and their index alone
    photos = load_photos(
        config.train_data_dir,
        min_side_px=config.resolution,
        scales=config.photo_scales,
        favourites=config.favourite_photos,
    )
    crops = RandomCrops(photos, config.resolution, config.seed)
    loader = accelerator.prepare(
        make_loader(
            crops,
            config.train_batch_size,
            step=step,
            max_steps=config.max_train_steps,
            processes=accelerator.num_processes,
        )
    )
    logger.info("%d photographs, %d parameters", len(photos), sum(p.numel() for p in parameters))

    losses = RunningMean()
    progress = tqdm(
        total=config.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_local_main_process
    )
    start = time.monotonic()
    for image in loader:
        image = image.to(memory_format=torch.channels_last)
        set_learning_rate(optimizer, learning_rate(config, step))

        # reconstruct through a sampled latent; only the networks run in low precision
        with accelerator.autocast():
            posterior = accelerator.unwrap_model(vae).encode(image).latent_dist
            reconstruction = accelerator.unwrap_model(vae).decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        pixel = reconstruction_loss(reconstruction.float(), image)
        loss = pixel + config.kl_weight * kl.float()

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        step += 1

        losses.add(pixel=pixel.detach(), kl=kl.detach())
        progress.update()
        if step % config.logging_steps == 0:
            logger.info("step %d %s (%.0f s)", step, losses.read(), time.monotonic() - start)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)

    # the result: averaged weights whose latents have mean 0 and deviation 1
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        result = accelerator.unwrap_model(vae)
        fold_latent_statistics(result, *latent_statistics(result, crops, count=256))
        result.save_pretrained(Path(config.output_dir) / "vae")


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, crops: RandomCrops, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, (C,), of the latents of the first `count` crops."""
    latents = torch.cat([vae.encode(crops[i][None].to(vae.device)).latent_dist.mean for i in range(count)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


if __name__ == "__main__":
    main(load_config(AutoencoderConfig, sys.argv[1:]))
