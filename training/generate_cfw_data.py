"""Restore degraded photographs with a pipeline and save its latents, for train_cfw.py.

python training/generate_cfw_data.py --config configs/mini/cfw_data.yaml --train_data_dir DATA
"""

import inspect
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.seeds import torch_stream
from stablesr_kit.spaces import image_to_pixels, image_to_unit
from stablesr_kit.training.data.batches import make_loader
from stablesr_kit.training.data.computed import TensorParts
from stablesr_kit.training.data.crops import report_skipped
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import open_pairs
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import LoaderOptions, PrecisionOptions, ProgramConfig


@dataclass(frozen=True, kw_only=True)
class CFWDataConfig(PrecisionOptions, LoaderOptions, PairOptions, ProgramConfig):
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
    """Noise of DDIM steps, 0 to 1; ignored by other schedulers."""


def main(config: CFWDataConfig) -> None:
    """Write output_dir/samples.safetensors: hq, lq (N, H, W, 3) uint8 and latents (N, C, h, w) float16.

    A run that was interrupted continues after the last batch, and writes the same file.
    """
    logging.basicConfig(level=logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = StableSRPipeline.from_pretrained(config.pretrained_model, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    step = pipeline.scheduler.step
    if "eta" in inspect.signature(step).parameters:  # only DDIM has it; a pipeline's call does not
        pipeline.scheduler.step = partial(step, eta=config.eta)
    pairs = open_pairs(config, config.seed)

    parts = TensorParts(Path(config.output_dir) / "samples.safetensors", config, Path(config.pretrained_model))

    starts = range(0, config.crops, config.batch_size)
    missing = [part for part in range(len(starts)) if part not in parts]
    batches = [list(range(starts[part], starts[part] + config.batch_size)) for part in missing]
    loader = make_loader(pairs, batches, config.dataloader_num_workers)
    for part, (_, (lq, hq)) in zip(missing, tqdm(loader, mininterval=10), strict=True):
        generator = torch_stream(config.seed, starts[part])
        with config.autocast(device):
            latents = pipeline(
                image_to_unit(lq),
                scale=1,
                w=0,
                num_inference_steps=config.steps[part % len(config.steps)],
                generator=generator,
                output_type="latent",
            ).images
        hq_pixels, lq_pixels = (torch.from_numpy(image_to_pixels(image)) for image in (hq, lq))
        parts.add(part, {"hq": hq_pixels, "lq": lq_pixels, "latents": latents.half().cpu()})

    report_skipped(pairs.crops)
    parts.join(len(starts))
    config.save(Path(config.output_dir) / "config.yaml")


if __name__ == "__main__":
    launch(main, CFWDataConfig)
