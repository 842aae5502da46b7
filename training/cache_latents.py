"""Encode photographs and their degraded versions once, for stages that train on latents.

python training/cache_latents.py --config configs/mini/latents.yaml --train_data_dir DATA
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm import trange

from stablesr_kit.spaces import to_latent
from stablesr_kit.training.config import ProgramConfig
from stablesr_kit.training.pairs import DegradedCrops
from stablesr_kit.training.photos import load_photos
from stablesr_kit.training.program import launch

logger = logging.getLogger("cache_latents")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(ProgramConfig):
    """Options of this program."""

    train_data_dir: str
    """Folder of photographs."""
    photo_scales: tuple[float, ...] = (1.0,)
    """Every photograph is used once at each of these sizes."""
    favourite_photos: tuple[str, ...] = ()
    """Patterns of file names that are drawn twice as often."""
    pretrained_vae: str
    """Folder of the autoencoder."""
    resolution: int = 256
    """Side of the square crops in px."""
    crops: int = 1500
    """Number of crops."""
    versions: int = 3
    """Degraded versions of each crop."""
    degradations: Mapping[str, float] = field(default_factory=lambda: {"stablesr-768v": 1.0})
    """Names of degradations and how often each is drawn."""


@torch.no_grad()
def main(config: CacheConfig) -> None:
    """Write output_dir/latents.safetensors: hq (N, C, h, w) and lq (N, versions, C, h, w), float16."""
    logging.basicConfig(level=logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = AutoencoderKL.from_pretrained(config.pretrained_vae).to(device, memory_format=torch.channels_last)
    photos = load_photos(
        config.train_data_dir,
        min_side_px=config.resolution,
        scales=config.photo_scales,
        favourites=config.favourite_photos,
    )
    pairs = DegradedCrops(photos, config.resolution, config.degradations, config.seed, config.versions)

    hq_latents, lq_latents = [], []
    for first in trange(0, config.crops * config.versions, config.versions, mininterval=10):
        # the good crop once, then its degraded versions, as one batch
        versions = [pairs[first + i] for i in range(config.versions)]
        images = torch.stack([versions[0].hq, *(pair.lq for pair in versions)])
        with torch.autocast(device.type, torch.bfloat16):
            z = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist.mean
        latents = to_latent(z.float(), vae).half().cpu()
        hq_latents.append(latents[0])
        lq_latents.append(latents[1:])

    hq, lq = torch.stack(hq_latents), torch.stack(lq_latents)
    logger.info("mean %s", [round(x, 3) for x in hq.float().mean(dim=(0, 2, 3)).tolist()])
    logger.info("deviation %s", [round(x, 3) for x in hq.float().std(dim=(0, 2, 3)).tolist()])
    logger.info("mean squared difference %.4f", (hq[:, None].float() - lq.float()).square().mean())
    output = Path(config.output_dir) / "latents.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({"hq": hq.contiguous(), "lq": lq.contiguous()}, output)
    config.save(output.with_name("config.yaml"))


if __name__ == "__main__":
    launch(main, CacheConfig)
