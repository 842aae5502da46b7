"""Restore degraded photographs with a pipeline and keep its latents, for train_cfw.py.

python training/generate_cfw_data.py --config configs/mini/cfw_data.yaml --train_data_dir DATA
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import trange

from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.spaces import image_to_pixels
from stablesr_kit.training.config import ProgramConfig
from stablesr_kit.training.data_options import PairOptions
from stablesr_kit.training.photo_crops import report_skipped
from stablesr_kit.training.photo_pairs import open_pairs
from stablesr_kit.training.program import launch


@dataclass(frozen=True, kw_only=True)
class CFWDataConfig(PairOptions, ProgramConfig):
    """Options of this program."""

    pretrained_model: str
    """Folder of the pipeline; it needs no fusion layers yet."""
    crops: int = 600
    """Number of crops."""
    batch_size: int = 2
    """Crops restored at a time."""
    steps: tuple[int, ...] = (4,)
    """Numbers of denoising steps, taken in turn."""
    eta: float = 1.0
    """Noise of the steps, for schedulers that take it."""


def main(config: CFWDataConfig) -> None:
    """Write output_dir/samples.safetensors: hq, lq (N, H, W, 3) uint8 and latents (N, C, h, w) float16."""
    logging.basicConfig(level=logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = StableSRPipeline.from_pretrained(config.pretrained_model, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pairs = open_pairs(config, config.seed)

    hq_pixels, lq_pixels, latents = [], [], []
    for i, first in enumerate(trange(0, config.crops, config.batch_size, mininterval=10)):
        batch = [pairs[index] for index in range(first, first + config.batch_size)]
        hq, lq = torch.stack([pair.hq for pair in batch]), torch.stack([pair.lq for pair in batch])
        generator = torch.Generator().manual_seed(config.seed + first)
        with torch.autocast(device.type, torch.bfloat16):
            sample = pipeline(
                (lq + 1) / 2,
                scale=1,
                w=0,
                num_inference_steps=config.steps[i % len(config.steps)],
                eta=config.eta,
                generator=generator,
                output_type="latent",
            ).images
        latents.append(sample.half().cpu())
        hq_pixels.append(torch.from_numpy(image_to_pixels(hq)))
        lq_pixels.append(torch.from_numpy(image_to_pixels(lq)))

    report_skipped(pairs.crops)
    output = Path(config.output_dir) / "samples.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"hq": hq_pixels, "lq": lq_pixels, "latents": latents}
    save_file({name: torch.cat(parts).contiguous() for name, parts in tensors.items()}, output)
    config.save(output.with_name("config.yaml"))


if __name__ == "__main__":
    launch(main, CFWDataConfig)
