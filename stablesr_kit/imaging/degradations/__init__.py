"""Synthetic degradations: LQ pictures for training, made from HQ ones.

`degrade` and `make_pair` take images, (B, 3, H, W) in [-1, 1]; the functions they use work in [0, 1], and say so.
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
