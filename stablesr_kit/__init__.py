"""Restore and enlarge real photographs with the prior of a frozen Stable Diffusion.

The names below are imported on first use: importing torch and diffusers takes seconds, asking for help must not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from stablesr_kit.version import __version__

if TYPE_CHECKING:
    from stablesr_kit.diffusion.spaced import SpacedDDIMScheduler, SpacedDDPMScheduler
    from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
    from stablesr_kit.models.time_aware_encoder import StableSRAdapter
    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
    from stablesr_kit.pipelines.face_refinement import FaceRefinement
    from stablesr_kit.pipelines.job import Job
    from stablesr_kit.pipelines.one_step import OneStepPipeline
    from stablesr_kit.pipelines.stablesr import StableSRPipeline
    from stablesr_kit.pipelines.video import StableSRVideo
    from stablesr_kit.tiling.memory import Tiling

__all__ = [
    "CodeFormerPipeline",
    "ControllableFeatureWrapping",
    "FaceRefinement",
    "Job",
    "OneStepPipeline",
    "SpacedDDIMScheduler",
    "SpacedDDPMScheduler",
    "StableSRAdapter",
    "StableSRPipeline",
    "StableSRVideo",
    "Tiling",
    "__version__",
]

_HOMES = {
    "CodeFormerPipeline": "stablesr_kit.pipelines.codeformer",
    "ControllableFeatureWrapping": "stablesr_kit.models.feature_wrapping",
    "FaceRefinement": "stablesr_kit.pipelines.face_refinement",
    "Job": "stablesr_kit.pipelines.job",
    "OneStepPipeline": "stablesr_kit.pipelines.one_step",
    "SpacedDDIMScheduler": "stablesr_kit.diffusion.spaced",
    "SpacedDDPMScheduler": "stablesr_kit.diffusion.spaced",
    "StableSRAdapter": "stablesr_kit.models.time_aware_encoder",
    "StableSRPipeline": "stablesr_kit.pipelines.stablesr",
    "StableSRVideo": "stablesr_kit.pipelines.video",
    "Tiling": "stablesr_kit.tiling.memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
