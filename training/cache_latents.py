"""Encode photographs and their degraded versions once, for stages that train on latents.

python training/cache_latents.py --config configs/mini/latents.yaml --train_data_dir DATA
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from stablesr_kit.spaces import to_latent
from stablesr_kit.training.data.batches import make_loader
from stablesr_kit.training.data.computed import TensorParts
from stablesr_kit.training.data.crops import report_skipped
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import open_pairs
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import LoaderOptions, PrecisionOptions, ProgramConfig
from stablesr_kit.training.run.networks import load_network

logger = logging.getLogger("cache_latents")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(PrecisionOptions, LoaderOptions, PairOptions, ProgramConfig):
    """Options of this program."""

    pretrained_vae: str
    """Folder of the autoencoder."""
    crops: int = 1500
    """Number of crops."""
    versions: int = 3
    """Degraded versions of each crop."""


@torch.no_grad()
def main(config: CacheConfig) -> None:
    """Write output_dir/latents.safetensors: hq (N, C, h, w) and lq (N, versions, C, h, w), float16.

    A run that was interrupted continues after the last crop, and writes the same file.
    """
    logging.basicConfig(level=logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae")
    vae.to(device, memory_format=torch.channels_last)
    pairs = open_pairs(config, config.seed, versions=config.versions)
    parts = TensorParts(Path(config.output_dir) / "latents.safetensors", config, Path(config.pretrained_vae))

    missing = [crop for crop in range(config.crops) if crop not in parts]
    versions = [[crop * config.versions + i for i in range(config.versions)] for crop in missing]
    loader = make_loader(pairs, versions, config.dataloader_num_workers)
    for crop, (_, pair) in zip(missing, tqdm(loader, mininterval=10), strict=True):
        # one batch: the HQ crop, then its degraded versions
        images = torch.cat([pair.hq[:1], pair.lq])
        with config.autocast(device):
            z = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist.mean
        latents = to_latent(z.float(), vae).half().cpu()
        parts.add(crop, {"hq": latents[:1], "lq": latents[None, 1:]})

    report_skipped(pairs.crops)
    whole = parts.join(config.crops)
    config.save(Path(config.output_dir) / "config.yaml")
    hq, lq = whole["hq"].float(), whole["lq"].float()
    logger.info("mean %s", [round(x, 3) for x in hq.mean(dim=(0, 2, 3)).tolist()])
    logger.info("deviation %s", [round(x, 3) for x in hq.std(dim=(0, 2, 3)).tolist()])
    logger.info("mean squared difference %.4f", (hq[:, None] - lq).square().mean())


if __name__ == "__main__":
    launch(main, CacheConfig)
