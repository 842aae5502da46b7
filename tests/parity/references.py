"""What every parity check needs: reading a reference file and comparing with it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Quantity = tuple[str, float, float]
"""Name, largest absolute difference, tolerance."""


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinity between different shapes and where ours is not a number."""
    if ours.shape != reference.shape or ours.isnan().any():
        return float("inf")
    return (ours.double() - reference.double()).abs().max().item()


def metadata(path: Path) -> dict[str, Any]:
    """What a reference file says of itself."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("meta", "{}"))


def uniform_weights(height: int, width: int) -> Tensor:
    """Weight 1, float64, for each position (height, width) of a tile."""
    return torch.ones(height, width, dtype=torch.float64)
