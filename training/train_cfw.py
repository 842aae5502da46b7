"""Train controllable feature wrapping on a pipeline's own samples; the autoencoder is frozen.

accelerate launch training/train_cfw.py --config configs/mini/cfw.yaml
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
from stablesr_kit.models.feature_wrapping import (
    ControllableFeatureWrapping,
    decode_with_features,
    encode_with_features,
)
from stablesr_kit.spaces import from_latent
from stablesr_kit.training.config import RunConfig, load_config
from stablesr_kit.training.losses import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    reconstruction_loss,
)
from stablesr_kit.training.pairs import RestoredCrops
from stablesr_kit.training.photos import make_loader
from stablesr_kit.training.run import (
    RunningMean,
    learning_rate,
    resume,
    save_checkpoint,
    set_learning_rate,
    start_run,
)
from stablesr_kit.training.small_autoencoder import start_fusion_silent

logger = logging.getLogger("train_cfw")


@dataclass(frozen=True, kw_only=True)
class CFWConfig(RunConfig):
    """Options of this program."""

    samples: str
    """File written by generate_cfw_data.py."""
    resolution: int = 64
    """Side of the square crops in px."""
    pretrained_vae: str
    """Folder of the autoencoder."""
    pretrained_cfw: str | None = None
    """Folder of fusion layers to start from; None builds untrained ones."""
    num_rrdb: int = 1
    """RRDBs per untrained fusion layer."""
    growth_channels: int = 16
    """Growth of the dense blocks of untrained fusion layers."""
    adversarial_weight: float = 0.0
    """Weight of the generator's loss against the discriminator."""
    feature_matching_weight: float = 0.0
    """Weight of the difference between the discriminator's features of both pictures."""
    discriminator_start: int = 0
    """Steps before the discriminator's losses count."""
    discriminator_warmup_steps: int = 200
    """Steps over which their weights then rise linearly from zero."""
    discriminator_learning_rate: float = 4e-4
    """Constant learning rate of the discriminator."""
    discriminator_channels: int = 32
    """Width of the discriminator's first layer."""


def main(config: CFWConfig) -> None:
    """Train, write checkpoints, and save the averaged fusion layers to output_dir/cfw."""
    accelerator = start_run(config)

    # networks: only the fusion layers are trained
    vae = AutoencoderKL.from_pretrained(config.pretrained_vae).to(memory_format=torch.channels_last)
    vae.requires_grad_(False)
    if config.pretrained_cfw is None:
        cfw = ControllableFeatureWrapping.from_vae(
            vae, num_rrdb=config.num_rrdb, growth_channels=config.growth_channels
        )
        start_fusion_silent(cfw)
    else:
        cfw = ControllableFeatureWrapping.from_pretrained(config.pretrained_cfw)
    cfw = cfw.to(memory_format=torch.channels_last)
    cfw.train()
    discriminator = PatchDiscriminator(base_channels=config.discriminator_channels)
    discriminator = discriminator.to(memory_format=torch.channels_last)
    parameters = list(cfw.parameters())
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, weight_decay=config.adam_weight_decay
    )
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0
    )
    cfw, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        cfw, discriminator, optimizer, discriminator_optimizer
    )
    vae.to(accelerator.device)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = resume(accelerator, config)

    # data: crops of what the pipeline was given, of its latent, and of the photograph
    crops = RestoredCrops(config.samples, config.resolution, config.seed)
    loader = accelerator.prepare(
        make_loader(
            crops,
            config.train_batch_size,
            step=step,
            max_steps=config.max_train_steps,
            processes=accelerator.num_processes,
        )
    )
    logger.info("%d trained parameters", sum(p.numel() for p in parameters))

    losses = RunningMean()
    progress = tqdm(
        total=config.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_local_main_process
    )
    start = time.monotonic()
    for lq, latent, hq in loader:
        lq = lq.to(memory_format=torch.channels_last)
        hq = hq.to(memory_format=torch.channels_last)
        set_learning_rate(optimizer, learning_rate(config, step))

        # decode the sample with the low-quality picture's features at full weight
        with accelerator.autocast():
            with torch.no_grad():
                _, features = encode_with_features(vae, lq, tuple(cfw.config.levels))
            z = from_latent(latent, vae).to(memory_format=torch.channels_last)
            fake = decode_with_features(vae, cfw, z, features, 1.0).float()
        pixel = reconstruction_loss(fake, hq)
        loss = pixel
        losses.add(pixel=pixel.detach())

        if config.adversarial_weight > 0 and step >= config.discriminator_start:
            # discriminator: told from the photograph
            with accelerator.autocast():
                real_logits, real_features = discriminator(hq)
                fake_logits, _ = discriminator(fake.detach())
            discriminator_loss = hinge_discriminator_loss(real_logits.float(), fake_logits.float())
            accelerator.backward(discriminator_loss)
            discriminator_optimizer.step()

            # fusion layers: close to the photograph to the discriminator's eye
            discriminator.requires_grad_(False)
            with accelerator.autocast():
                fake_logits, fake_features = discriminator(fake)
            matching = feature_matching_loss(fake_features, [feature.detach() for feature in real_features])
            adversarial = hinge_generator_loss(fake_logits.float())
            ramp = min(1.0, (step - config.discriminator_start) / max(config.discriminator_warmup_steps, 1))
            loss = pixel + ramp * (config.feature_matching_weight * matching + config.adversarial_weight * adversarial)
            losses.add(
                matching=matching.detach(),
                adversarial=adversarial.detach(),
                discriminator=discriminator_loss.detach(),
            )

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        discriminator.requires_grad_(True)
        discriminator_optimizer.zero_grad()
        ema.step(parameters)
        step += 1

        progress.update()
        if step % config.logging_steps == 0:
            logger.info("step %d %s (%.0f s)", step, losses.read(), time.monotonic() - start)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)

    # the result: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        accelerator.unwrap_model(cfw).save_pretrained(Path(config.output_dir) / "cfw")


if __name__ == "__main__":
    main(load_config(CFWConfig, sys.argv[1:]))
