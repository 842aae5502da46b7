"""Synthetic damage: good pictures in, the pictures a restorer is trained on out.

`degrade` and `make_pair` take pictures of the *image* space, (B, 3, H, W) in [-1, 1]; the parts they are made of
work in [0, 1], and say so.
"""

from stablesr_kit.imaging.degradations.classical import ClassicalConfig
from stablesr_kit.imaging.degradations.pairs import (
    DESCRIPTIONS,
    PRESETS,
    DegradationConfig,
    Pair,
    degrade,
    find_preset,
    make_pair,
)
from stablesr_kit.imaging.degradations.second_order import BlurConfig, NoiseConfig, PassConfig, SecondOrderConfig

__all__ = [
    "DESCRIPTIONS",
    "PRESETS",
    "BlurConfig",
    "ClassicalConfig",
    "DegradationConfig",
    "NoiseConfig",
    "Pair",
    "PassConfig",
    "SecondOrderConfig",
    "degrade",
    "find_preset",
    "make_pair",
]
