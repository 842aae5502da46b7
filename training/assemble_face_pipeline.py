"""Save a trained CodeFormer as a pipeline for `CodeFormerPipeline.from_pretrained`.

python training/assemble_face_pipeline.py --config configs/mini_faces/pipeline.yaml
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
from stablesr_kit.training.run.command_line import launch
from stablesr_kit.training.run.config import ProgramConfig
from stablesr_kit.training.run.networks import load_network, save_small_pipeline


@dataclass(frozen=True, kw_only=True)
class AssembleFacesConfig(ProgramConfig):
    """Options of this program."""

    pretrained_codeformer: str
    """Folder of the CodeFormer."""
    max_enlargement: float | None = None
    """A face in a photograph is left alone if its result would be more than this many times larger than the model's
    own pictures; None: no limit."""
    fusion_scale: float = 1.0
    """Factor of the fused features at every w; below 1 for models that are most faithful at a w below 1."""


def main(config: AssembleFacesConfig) -> None:
    """Write the pipeline to output_dir, its weights in float16."""
    codeformer = load_network(CodeFormer, config.pretrained_codeformer, "pretrained_codeformer")
    with torch.no_grad():
        for fusion in codeformer.fusions.values():
            for last in (fusion.scale[-1], fusion.shift[-1]):
                last.weight.mul_(config.fusion_scale)
                last.bias.mul_(config.fusion_scale)
    save_small_pipeline(CodeFormerPipeline(codeformer, max_enlargement=config.max_enlargement), Path(config.output_dir))


if __name__ == "__main__":
    launch(main, AssembleFacesConfig)
