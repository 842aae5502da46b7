"""Checkpoints of other programs: read safely, brought to one form, recognised, converted."""

from stablesr_kit.checkpoints.canonical import canonicalize
from stablesr_kit.checkpoints.converting import convert_checkpoint, load_official
from stablesr_kit.checkpoints.detecting import Hints, detect
from stablesr_kit.checkpoints.inspecting import CheckpointReport, inspect_checkpoint
from stablesr_kit.checkpoints.reading import read_checkpoint

__all__ = [
    "CheckpointReport",
    "Hints",
    "canonicalize",
    "convert_checkpoint",
    "detect",
    "inspect_checkpoint",
    "load_official",
    "read_checkpoint",
]
