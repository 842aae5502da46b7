"""Sharpen an autoencoder's decoder with a discriminator; the encoder and its latents stay as they are.

accelerate launch training/train_decoder.py --config configs/mini/decoder.yaml --train_data_dir DATA
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from stablesr_kit.models.discriminators import PatchDiscriminator
from stablesr_kit.training.config import RunConfig, load_config
from stablesr_kit.training.losses import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    reconstruction_loss,
)
from stablesr_kit.training.photos import RandomCrops, load_photos, make_loader
from stablesr_kit.training.run import (
    RunningMean,
    learning_rate,
    resume,
    save_checkpoint,
    set_learning_rate,
    start_run,
)

logger = logging.getLogger("train_decoder")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RunConfig):
    """Options of this program."""

    train_data_dir: str
    """Folder of photographs."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Every photograph is used once at each of these sizes."""
    favourite_photos: tuple[str, ...] = ()
    """Patterns of file names that are drawn twice as often."""
    resolution: int = 96
    """Side of the square crops in px."""
    pretrained_vae: str
    """Folder of the autoencoder to start from."""
    latent_noise: float = 0.0
    """Deviation of noise added to the latents: what a diffusion model hands over is never exact."""
    trained_share: float = 1.0
    """What is saved is this share of the trained decoder and the rest of the one it started from (network
    interpolation, Wang et al. 2018, ESRGAN): between clean and textured."""
    adversarial_weight: float = 0.02
    """Weight of the generator's loss against the discriminator."""
    feature_matching_weight: float = 0.5
    """Weight of the difference between the discriminator's features of both pictures."""
    discriminator_warmup_steps: int = 200
    """Steps over which the weights of both rise linearly from zero."""
    discriminator_learning_rate: float = 4e-4
    """Constant learning rate of the discriminator."""
    discriminator_channels: int = 32
    """Width of the discriminator's first layer."""


def main(config: DecoderConfig) -> None:
    """Train, write checkpoints, and save the autoencoder with the averaged decoder to output_dir/vae."""
    accelerator = start_run(config)

    # networks: only the decoder is trained
    vae = AutoencoderKL.from_pretrained(config.pretrained_vae).to(memory_format=torch.channels_last)
    vae.requires_grad_(False)
    discriminator = PatchDiscriminator(base_channels=config.discriminator_channels)
    discriminator = discriminator.to(memory_format=torch.channels_last)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    first_parameters = [parameter.detach().to(accelerator.device, copy=True) for parameter in parameters]
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, weight_decay=config.adam_weight_decay
    )
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0
    )
    vae, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        vae, discriminator, optimizer, discriminator_optimizer
    )
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
    loader = accelerator.prepare(
        make_loader(
            RandomCrops(photos, config.resolution, config.seed),
            config.train_batch_size,
            step=step,
            max_steps=config.max_train_steps,
            processes=accelerator.num_processes,
        )
    )
    logger.info("%d photographs, %d trained parameters", len(photos), sum(p.numel() for p in parameters))

    losses = RunningMean()
    progress = tqdm(
        total=config.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_local_main_process
    )
    start = time.monotonic()
    for image in loader:
        image = image.to(memory_format=torch.channels_last)
        set_learning_rate(optimizer, learning_rate(config, step))

        # reconstruct from a latent that is slightly off
        with accelerator.autocast():
            with torch.no_grad():
                z = vae.encode(image).latent_dist.mean
                z = z + config.latent_noise * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
            fake = vae.decode(z).sample.float()

        # discriminator: told from the photograph
        with accelerator.autocast():
            real_logits, real_features = discriminator(image)
            fake_logits, _ = discriminator(fake.detach())
        discriminator_loss = hinge_discriminator_loss(real_logits.float(), fake_logits.float())
        accelerator.backward(discriminator_loss)
        discriminator_optimizer.step()

        # decoder: close to the photograph in pixels and to the discriminator's eye
        discriminator.requires_grad_(False)
        with accelerator.autocast():
            fake_logits, fake_features = discriminator(fake)
        pixel = reconstruction_loss(fake, image)
        matching = feature_matching_loss(fake_features, [feature.detach() for feature in real_features])
        adversarial = hinge_generator_loss(fake_logits.float())
        ramp = min(1.0, step / max(config.discriminator_warmup_steps, 1))
        loss = pixel + ramp * (config.feature_matching_weight * matching + config.adversarial_weight * adversarial)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        discriminator.requires_grad_(True)
        discriminator_optimizer.zero_grad()
        ema.step(parameters)
        step += 1

        losses.add(
            pixel=pixel.detach(),
            matching=matching.detach(),
            adversarial=adversarial.detach(),
            discriminator=discriminator_loss.detach(),
        )
        progress.update()
        if step % config.logging_steps == 0:
            logger.info("step %d %s (%.0f s)", step, losses.read(), time.monotonic() - start)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)

    # the result: the averaged decoder, mixed with the first one, beside the encoder it belongs to
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        with torch.no_grad():
            for parameter, first in zip(parameters, first_parameters, strict=True):
                parameter.lerp_(first, 1 - config.trained_share)
        accelerator.unwrap_model(vae).save_pretrained(Path(config.output_dir) / "vae")


if __name__ == "__main__":
    main(load_config(DecoderConfig, sys.argv[1:]))
