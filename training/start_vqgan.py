"""Start a narrow VQGAN from a trained autoencoder. Only the levels between its latent and the codes are trained.

The features of the faces are computed once, so that this takes a tenth of the time of stage I, which continues from the
result.

accelerate launch training/start_vqgan.py --config configs/mini_faces/start.yaml --train_data_dir '[FACES]'
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from stablesr_kit.models.vqgan import VQGAN
from stablesr_kit.pipelines.loading import resolve_model
from stablesr_kit.seeds import stream
from stablesr_kit.training.data.crops import PhotoCrops, RandomCrops, report_skipped
from stablesr_kit.training.data.options import PhotoOptions
from stablesr_kit.training.losses.codebooks import CodebookOptions, refresh_codebook
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.run import TrainingRun
from stablesr_kit.training.small import GraftedVQGAN, target_features

FEATURE_BATCH = 8
"""Crops per batch when features are computed. All features are normalised by the statistics of the first batch."""


@dataclass(frozen=True, kw_only=True)
class StartConfig(CodebookOptions, PhotoOptions, RunConfig):
    """Options of this program."""

    pretrained_model: str = "mini"
    """Pipeline to take the autoencoder from: mini, or a folder."""
    image_size: int | None = None
    """Side in px of the pictures that the VQGAN is for, if the crops are smaller; None: resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 6, 8)
    """Widths of the levels, in units of the autoencoder's first width; the first levels are the autoencoder's own."""
    codebook_size: int = 512
    """Number of codes."""
    code_channels: int = 64
    """Width of a code."""
    cached_crops: int = 1000
    """Number of crops to train on; their features are kept in memory, 1.6 MB each at 256 px."""
    quantization_start: int = 100
    """Steps without quantisation at the start."""
    codebook_weight: float = 0.25
    """Weight of the quantiser's loss."""


class CachedFeatures(Dataset[tuple[Tensor, Tensor]]):
    """Input and target of the inner levels, as bfloat16; item i depends on seed and i only."""

    def __init__(self, given: Tensor, wanted: Tensor, seed: int) -> None:
        self.given = given
        self.wanted = wanted
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        which = int(stream(self.seed, index).integers(len(self.given)))
        return self.given[which].float(), self.wanted[which].float()


def main(config: StartConfig) -> None:
    """Train, write checkpoints, and save the VQGAN with averaged weights to output_dir/vqgan."""
    run = TrainingRun(config)
    crops = PhotoCrops(config, config.seed, run.share)
    vae = AutoencoderKL.from_pretrained(resolve_model(config.pretrained_model) / "vae", torch_dtype=torch.float32)
    vae = vae.to(run.accelerator.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    vqgan = VQGAN(
        image_size=config.image_size or config.resolution,
        base_channels=vae.config.block_out_channels[0],
        channel_multipliers=config.channel_multipliers,
        layers_per_block=1,
        attention_resolutions=(),
        norm_num_groups=vae.config.norm_num_groups,
        codebook_size=config.codebook_size,
        code_channels=config.code_channels,
    ).to(run.accelerator.device)
    if config.gradient_checkpointing:
        vqgan.enable_gradient_checkpointing()
    images = RandomCrops(crops)
    graft = GraftedVQGAN(vqgan, vae, torch.stack([images[i] for i in range(4)]).to(run.accelerator.device))
    graft.to(memory_format=torch.channels_last)
    features, mean, std = cache_features(run, graft, vae, images, config)
    reconstruct = run.train(graft.train(), {"vqgan": "vqgan"})

    def find_latents(count: int) -> Tensor:
        first = run.step * run.samples_per_step
        with run.accelerator.autocast():
            latents = [graft.encode(features[first + i][0][None].to(mean.device)).float() for i in range(count)]
        return rearrange(latents, "n 1 c h w -> (n h w) c")

    for _, (given, wanted) in run.batches(features):
        is_quantized = run.step >= config.quantization_start
        if run.is_first_batch_of_step:
            refresh_codebook(config, vqgan.quantizer.codebook, run.step, find_latents)
        output, quantized = reconstruct(given.to(memory_format=torch.channels_last), is_quantized)
        output = (output.float() - mean) / std
        feature = F.l1_loss(output, wanted) + 0.5 * F.mse_loss(F.avg_pool2d(output, 4), F.avg_pool2d(wanted, 4))
        # without quantisation, the quantiser's loss would only restrain the latent
        loss = feature + (config.codebook_weight if is_quantized else 0.0) * quantized.loss
        run.backward(loss)
        run.update(feature=feature, codebook=quantized.loss, perplexity=quantized.perplexity)

    report_skipped(crops, run.accelerator)
    run.finish({"vqgan": run.averaged("vqgan")})


@torch.no_grad()
def cache_features(
    run: TrainingRun, graft: GraftedVQGAN, vae: AutoencoderKL, images: RandomCrops, config: StartConfig
) -> tuple[CachedFeatures, Tensor, Tensor]:
    """Features of the first crops, and mean and deviation (1, C, 1, 1) that normalise the targets."""
    given, wanted = [], []
    count, batch = config.cached_crops, FEATURE_BATCH
    for first in tqdm(range(0, count, batch), desc="features", disable=not run.is_main, mininterval=5):
        image = torch.stack([images[i] for i in range(first, min(first + batch, count))])
        image = image.to(run.accelerator.device, memory_format=torch.channels_last)
        with run.accelerator.autocast():
            given.append(graft.outer_encode(image).bfloat16().cpu())
            wanted.append(target_features(vae, image).bfloat16().cpu())
    std, mean = torch.std_mean(torch.cat(wanted)[:FEATURE_BATCH].float(), dim=(0, 2, 3), keepdim=True)
    normalised = torch.cat([((features.float() - mean) / std).bfloat16() for features in wanted])
    device = run.accelerator.device
    return CachedFeatures(torch.cat(given), normalised, config.seed), mean.to(device), std.to(device)


if __name__ == "__main__":
    launch(main, StartConfig)
