"""Crop and degrade photographs once, for train_few_step.py on machines where this takes longer than training.

python training/cache_pairs.py --config configs/mini/few_step_pairs.yaml --train_data_dir DATA
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from stablesr_kit.spaces import image_to_pixels
from stablesr_kit.training.data.batches import make_loader
from stablesr_kit.training.data.computed import TensorParts
from stablesr_kit.training.data.crops import report_skipped
from stablesr_kit.training.data.options import PairOptions
from stablesr_kit.training.data.pairs import open_pairs
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import LoaderOptions, ProgramConfig


@dataclass(frozen=True, kw_only=True)
class CachePairsConfig(LoaderOptions, PairOptions, ProgramConfig):
    """Options of this program."""

    crops: int = 4000
    """Number of pairs."""
    part_size: int = 50
    """Pairs per part; a run that was interrupted continues after the last part."""


def main(config: CachePairsConfig) -> None:
    """Write output_dir/pairs.safetensors: hq, lq (N, resolution, resolution, 3) uint8.

    A run that was interrupted continues after the last part, and writes the same file.
    """
    logging.basicConfig(level=logging.INFO)
    pairs = open_pairs(config, config.seed)
    parts = TensorParts(Path(config.output_dir) / "pairs.safetensors", config, None)

    starts = range(0, config.crops, config.part_size)
    missing = [part for part in range(len(starts)) if part not in parts]
    batches = [list(range(starts[i], min(starts[i] + config.part_size, config.crops))) for i in missing]
    loader = make_loader(pairs, batches, config.dataloader_num_workers)
    for part, (_, (lq, hq)) in zip(missing, tqdm(loader, mininterval=10), strict=True):
        hq_pixels, lq_pixels = (torch.from_numpy(image_to_pixels(image)) for image in (hq, lq))
        parts.add(part, {"hq": hq_pixels, "lq": lq_pixels})

    report_skipped(pairs.crops)
    parts.join(len(starts))
    config.save(Path(config.output_dir) / "config.yaml")


if __name__ == "__main__":
    launch(main, CachePairsConfig)
