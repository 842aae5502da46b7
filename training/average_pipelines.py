"""Average the weights of pipelines that were trained from each other, which calms what each learned last.

python training/average_pipelines.py --config configs/mini/few_step_mean.yaml
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import ProgramConfig
from stablesr_kit.training.run.networks import load_network, save_small_pipeline

PARTS = {
    "unet": UNet2DConditionModel,
    "adapter": StableSRAdapter,
    "vae": AutoencoderKL,
    "cfw": ControllableFeatureWrapping,
}


@dataclass(frozen=True, kw_only=True)
class AverageConfig(ProgramConfig):
    """Options of this program."""

    pretrained_model: str
    """Folder of the first pipeline, of which all but the weights is kept."""
    others: tuple[str, ...]
    """Folders of the other pipelines, or checkpoints of their training, of which the averaged weights are taken."""


@torch.no_grad()
def main(config: AverageConfig) -> None:
    """Write the pipeline with the mean of all weights to output_dir, in float16."""
    pipeline = StableSRPipeline.from_pretrained(config.pretrained_model, dtype=torch.float32)
    for name, kind in PARTS.items():
        network = getattr(pipeline, name)
        if network is None:
            continue
        others = [load_network(kind, str(part_of(Path(folder), name)), "others") for folder in config.others]
        for folder, other in zip(config.others, others, strict=True):
            if shapes(other) != shapes(network):
                raise ConfigError(
                    f"{folder} has another {name} than {config.pretrained_model}; give pipelines of the same networks"
                )
        for first, *rest in zip(network.parameters(), *(other.parameters() for other in others), strict=True):
            first.copy_(torch.stack([first, *rest]).mean(dim=0))
    save_small_pipeline(pipeline, Path(config.output_dir))


def part_of(folder: Path, name: str) -> Path:
    """Where a pipeline, or a checkpoint of a training, has a network."""
    averaged = folder / f"{name}_ema"
    return averaged if averaged.is_dir() else folder / name


def shapes(network: nn.Module) -> list[torch.Size]:
    """The shapes of all weights."""
    return [parameter.shape for parameter in network.parameters()]


if __name__ == "__main__":
    launch(main, AverageConfig)
