"""Checkpoints of other programs: read safely, brought to one form, recognised, converted.

The names below are imported on first use: saying what a file is takes neither diffusers nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablesr_kit.checkpoints.canonical import canonicalize
    from stablesr_kit.checkpoints.converting import convert_checkpoint, load_official
    from stablesr_kit.checkpoints.detecting import Hints, detect
    from stablesr_kit.checkpoints.inspecting import CheckpointReport, inspect_checkpoint
    from stablesr_kit.checkpoints.reading import read_checkpoint

_HOMES = {
    "CheckpointReport": "inspecting",
    "Hints": "detecting",
    "canonicalize": "canonical",
    "convert_checkpoint": "converting",
    "detect": "detecting",
    "inspect_checkpoint": "inspecting",
    "load_official": "converting",
    "read_checkpoint": "reading",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
