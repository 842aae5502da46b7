"""Train an autoencoder on photographs.

accelerate launch training/train_autoencoder.py --config configs/mini/autoencoder.yaml --train_data_dir DATA
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.feature_wrapping import scale_factor
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, report_skipped
from stablesr_kit.training.data.options import PhotoOptions
from stablesr_kit.training.losses.pictures import reconstruction_loss
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import PhotoValidationOptions, photo_examples, reconstructed
from stablesr_kit.training.small import build_small_autoencoder, fold_latent_statistics


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(PhotoValidationOptions, PhotoOptions, RunConfig):
    """Options of this program."""

    pretrained_vae: str | None = None
    """Folder of an autoencoder to start from; None builds an untrained one."""
    block_out_channels: tuple[int, ...] = (24, 48, 96)
    """Widths of the levels of an untrained autoencoder; each level but the last halves the picture."""
    layers_per_block: int = 1
    """Residual blocks per level of an untrained autoencoder."""
    latent_channels: int = 4
    """Channels of the latent of an untrained autoencoder."""
    kl_weight: float = 1e-3
    """Weight of the KL divergence of the posterior from a unit normal, averaged over latent elements."""


class Reconstruction(nn.Module):
    """An autoencoder that reconstructs from a sampled latent."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B, 3, H, W), and the KL divergence of the posterior, averaged over latent elements.

        image: (B, 3, H, W) in [-1, 1]; noise: standard normal, (B, C, h, w).
        """
        posterior = self.vae.encode(image).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction, posterior.kl().mean() / posterior.mean[0].numel()


def main(config: AutoencoderConfig) -> None:
    """Train, write checkpoints, and save the averaged weights with normalised latents to output_dir/vae."""
    run = TrainingRun(config)
    crops = PhotoCrops(config, config.seed, run.share)
    images = RandomCrops(crops)

    if config.pretrained_vae is None:
        vae = build_small_autoencoder(config.block_out_channels, config.latent_channels, config.layers_per_block)
    else:
        vae = load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae")
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    network = Reconstruction(vae.to(memory_format=torch.channels_last).train())
    reconstruct = run.train(network, {"vae": "vae"})
    examples = photo_examples(config, multiple=scale_factor(vae))
    run.validate(config, "vae", examples, reconstructed, Quality(config.niqe_statistics, config.metric_weights))

    for draws, image in run.batches(images):
        image = image.to(memory_format=torch.channels_last)

        # reconstruct through a sampled latent; only the network runs in low precision
        noise = draws.normal(image.new_empty(latent_shape(vae, image)))
        reconstruction, kl = reconstruct(image, noise.to(memory_format=torch.channels_last))
        pixel = reconstruction_loss(reconstruction.float(), image)
        loss = pixel + config.kl_weight * kl.float()

        run.backward(loss)
        run.update(pixel=pixel, kl=kl)

    report_skipped(crops, run.accelerator)

    # the result: averaged weights, rescaled so that latents have mean 0 and deviation 1
    vae = run.averaged("vae")
    if run.is_main:
        fold_latent_statistics(vae, *latent_statistics(vae, images, count=256))
    run.finish({"vae": vae})


def latent_shape(vae: AutoencoderKL, image: Tensor) -> tuple[int, int, int, int]:
    """(B, C, h, w) of the latent of an image batch (B, 3, H, W)."""
    factor = scale_factor(vae)
    batch, _, height, width = image.shape
    return batch, vae.config.latent_channels, height // factor, width // factor


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: RandomCrops, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, (C,), of the latents of the first `count` crops."""
    latents = torch.cat([vae.encode(images[i][None].to(vae.device)).latent_dist.mean for i in range(count)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


if __name__ == "__main__":
    launch(main, AutoencoderConfig)
