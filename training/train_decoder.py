"""Sharpen an autoencoder's decoder with a discriminator; the encoder and its latents stay as they are.

accelerate launch training/train_decoder.py --config configs/mini/decoder.yaml --train_data_dir DATA
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.feature_wrapping import scale_factor
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, report_skipped
from stablesr_kit.training.data.options import PhotoOptions
from stablesr_kit.training.losses.adversarial import AdversarialOptions, Adversary
from stablesr_kit.training.losses.pictures import reconstruction_loss
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import InterpolationOptions, interpolate, load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import PhotoValidationOptions, photo_examples, reconstructed


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(AdversarialOptions, InterpolationOptions, PhotoValidationOptions, PhotoOptions, RunConfig):
    """Options of this program."""

    pretrained_vae: str
    """Folder of the autoencoder to start from."""
    latent_noise: float = 0.0
    """Largest standard deviation of noise added to the latents, since sampled latents are not exact."""
    adversarial_weight: float = 0.02
    """Weight of the adversarial loss."""
    feature_matching_weight: float = 0.5
    """Weight of the feature matching loss: the difference of the discriminator's features."""


class Decoding(nn.Module):
    """An autoencoder whose decoder is trained."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """Image (B, 3, H, W) of the raw code z (B, C, h, w)."""
        return self.vae.decode(z).sample


def main(config: DecoderConfig) -> None:
    """Train, write checkpoints, and save the autoencoder with the averaged decoder to output_dir/vae."""
    run = TrainingRun(config)
    crops = PhotoCrops(config, config.seed, run.share)
    images = RandomCrops(crops)

    # only the decoder is trained
    vae = load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae").to(memory_format=torch.channels_last)
    vae.requires_grad_(False)
    for module in (vae.decoder, vae.post_quant_conv):
        if module is not None:
            module.requires_grad_(True).train()
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    decode = run.train(Decoding(vae), {"vae": "vae"})
    adversary = Adversary(run, config)
    examples = photo_examples(config, multiple=scale_factor(vae))
    run.validate(config, "vae", examples, reconstructed, Quality(config.niqe_statistics, config.metric_weights))

    for draws, image in run.batches(images):
        image = image.to(memory_format=torch.channels_last)

        # reconstruct from a latent with noise
        with torch.no_grad(), run.accelerator.autocast():
            z = vae.encode(image).latent_dist.mean
        amount = config.latent_noise * draws.uniform().to(z)[:, None, None, None]
        fake = decode(z + amount * draws.normal(z)).float()

        # reconstruction loss and adversarial loss
        pixel = reconstruction_loss(fake, image)
        adversarial, terms = adversary.judge(fake, image)
        run.backward(pixel + adversarial)
        run.update(pixel=pixel, **terms)

    report_skipped(crops, run.accelerator)

    # the result: encoder and averaged decoder, which is interpolated with the one it started from
    vae = run.averaged("vae")
    if run.is_main:
        interpolate(vae, load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae"), config)
    run.finish({"vae": vae})


if __name__ == "__main__":
    launch(main, DecoderConfig)
