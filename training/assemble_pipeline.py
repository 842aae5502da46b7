"""Assemble trained networks to a pipeline for `StableSRPipeline.from_pretrained`.

python training/assemble_pipeline.py --config configs/mini/pipeline.yaml
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.pipelines.stablesr import StableSRPipeline
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import ProgramConfig
from stablesr_kit.training.run.networks import load_network, save_small_pipeline
from stablesr_kit.training.small import build_small_scheduler


@dataclass(frozen=True, kw_only=True)
class AssembleConfig(ProgramConfig):
    """Options of this program."""

    pretrained_vae: str
    """Folder of the autoencoder."""
    pretrained_unet: str
    """Folder of the UNet."""
    pretrained_adapter: str
    """Folder of the adapter."""
    pretrained_cfw: str | None = None
    """Folder of the fusion layers; None leaves them out."""
    default_steps: int = 4
    """Denoising steps of a call that gives no number."""
    margin_px: int = 0
    """Reflected margin around the picture, in pixels of the result."""
    working_scale: float = 0
    """Smaller enlargements are made at this scale and reduced; 0 makes every result at its own scale."""


def main(config: AssembleConfig) -> None:
    """Write the pipeline to output_dir, its weights in float16."""
    cfw = None
    if config.pretrained_cfw is not None:
        cfw = load_network(ControllableFeatureWrapping, config.pretrained_cfw, "pretrained_cfw")
    pipeline = StableSRPipeline(
        vae=load_network(AutoencoderKL, config.pretrained_vae, "pretrained_vae"),
        unet=load_network(UNet2DConditionModel, config.pretrained_unet, "pretrained_unet"),
        adapter=load_network(StableSRAdapter, config.pretrained_adapter, "pretrained_adapter"),
        scheduler=build_small_scheduler(),
        cfw=cfw,
        default_steps=config.default_steps,
        margin_px=config.margin_px,
        working_scale=config.working_scale,
    )
    save_small_pipeline(pipeline, Path(config.output_dir))


if __name__ == "__main__":
    launch(main, AssembleConfig)
