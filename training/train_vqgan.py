"""Train CodeFormer's stage I: a VQ autoencoder of aligned faces (Zhou et al. 2022, sec. 3.1; Esser et al. 2021).

accelerate launch training/train_vqgan.py --config configs/official/vqgan_512.yaml --train_data_dir FACES
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from stablesr_kit.evaluation.quality import Quality
from stablesr_kit.models.vqgan import VQGAN, GumbelQuantizer
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, report_skipped
from stablesr_kit.training.data.options import PhotoOptions
from stablesr_kit.training.losses.adversarial import VQGANAdversary, VQGANAdversaryOptions
from stablesr_kit.training.losses.codebooks import CodebookOptions, refresh_codebook
from stablesr_kit.training.losses.pictures import PictureLoss, PictureLossOptions
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.networks import load_network
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.run.validation import Example, PhotoValidationOptions, photo_examples


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(
    CodebookOptions, VQGANAdversaryOptions, PictureLossOptions, PhotoValidationOptions, PhotoOptions, RunConfig
):
    """Options of this program."""

    image_size: int | None = None
    """Side in px of the pictures that the VQGAN is for, if the crops are smaller; None: resolution."""
    pretrained_vqgan: str | None = None
    """Folder of a VQGAN to start from; None builds an untrained one from the options below."""
    base_channels: int = 64
    """Width of its first convolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4, 8)
    """Widths of its levels in units of base_channels; each level but the last halves the picture."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sizes in px of the feature maps with attention."""
    norm_num_groups: int = 32
    """Groups of its group norms; narrow networks need few, since more of them lose brightness and colour."""
    codebook_size: int = 1024
    """Number of codes."""
    code_channels: int = 256
    """Width of a code."""
    quantization: Literal["nearest", "gumbel"] = "nearest"
    """How a code is chosen: the nearest one, or sampled by Gumbel softmax."""
    gumbel_annealing_steps: int = 160_000
    """Steps over which Gumbel's temperature falls from 1 towards 0, at least 1/16."""
    codebook_weight: float = 1.0
    """Weight of the quantiser's loss."""


def main(config: VQGANConfig) -> None:
    """Train, write checkpoints, and save averaged weights to output_dir/vqgan, the discriminator beside them."""
    run = TrainingRun(config)
    crops = PhotoCrops(config, config.seed, run.share)
    images = RandomCrops(crops)

    if config.pretrained_vqgan is None:
        vqgan = build_vqgan(config)
    else:
        vqgan = load_network(VQGAN, config.pretrained_vqgan, "pretrained_vqgan")
    if config.gradient_checkpointing:
        vqgan.enable_gradient_checkpointing()
    reconstruct = run.train(vqgan.to(memory_format=torch.channels_last).train(), {"vqgan": ""})
    picture_loss = PictureLoss(config, run.accelerator.device)
    adversary = VQGANAdversary(run, config) if config.adversarial_weight > 0 else None
    run.validate(
        config,
        "vqgan",
        photo_examples(config, vqgan.factor),
        reconstructed,
        Quality(config.niqe_statistics, config.metric_weights),
    )

    def find_latents(count: int) -> Tensor:
        first = run.step * run.samples_per_step
        with run.accelerator.autocast():
            latents = [
                vqgan.encoder(images[first + i][None].to(run.accelerator.device))[0].float() for i in range(count)
            ]
        return rearrange(latents, "n 1 c h w -> (n h w) c")

    for _, image in run.batches(images):
        image = image.to(memory_format=torch.channels_last)
        if run.is_first_batch_of_step:
            refresh_codebook(config, vqgan.quantizer.codebook, run.step, find_latents)
            if isinstance(vqgan.quantizer, GumbelQuantizer):
                vqgan.quantizer.temperature = max(1 / 16, 1 - run.step / config.gumbel_annealing_steps)

        fake, quantized = reconstruct(image)
        fake = fake.float()
        loss, terms = picture_loss(fake, image)
        terms |= {"codebook": quantized.loss, "perplexity": quantized.perplexity}
        if adversary is not None:
            adversarial, judged = adversary.judge(fake, image, loss, vqgan.decoder.conv_out.weight)
            loss, terms = loss + adversarial, terms | judged
        run.backward(loss + config.codebook_weight * quantized.loss)
        run.update(**terms)

    report_skipped(crops, run.accelerator)
    results = {"vqgan": run.averaged("vqgan")}
    if adversary is not None:
        results["discriminator"] = run.averaged("discriminator")
    run.finish(results)


def reconstructed(vqgan: VQGAN, example: Example) -> Tensor:
    """An example, reconstructed from its nearest codes."""
    indices = vqgan.quantizer.nearest(vqgan.encoder(example.lq)[0])
    return vqgan.decode(vqgan.quantizer.lookup(indices))


def build_vqgan(config: VQGANConfig) -> VQGAN:
    """An untrained VQGAN as the options describe it."""
    return VQGAN(
        image_size=config.image_size or config.resolution,
        base_channels=config.base_channels,
        channel_multipliers=config.channel_multipliers,
        layers_per_block=config.layers_per_block,
        attention_resolutions=config.attention_resolutions,
        norm_num_groups=config.norm_num_groups,
        codebook_size=config.codebook_size,
        code_channels=config.code_channels,
        quantization=config.quantization,
    )


if __name__ == "__main__":
    launch(main, VQGANConfig)
