"""What every parity check needs: reading a reference file and comparing with it."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

Quantity = tuple[str, float | None, float]
"""Name, largest absolute difference (None: not computed yet), tolerance."""


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinity between different shapes and where ours is not a number."""
    if ours.shape != reference.shape or ours.isnan().any():
        return float("inf")
    return (ours.double() - reference.double()).abs().max().item()


def metadata(path: Path) -> dict[str, Any]:
    """What a reference file says of itself."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("meta", "{}"))
