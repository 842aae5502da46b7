"""What every parity check needs: reading a reference file and comparing with it.

A reference set may hold fewer quantities than those we know. What we compute is therefore given as functions, and only
those whose result the set holds are called; where the set lacks their input, the quantity is passed over with a note.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger(__name__)

Quantity = tuple[str, float, float]
"""Name, largest absolute difference, tolerance."""

Ours = dict[str, Callable[[], Tensor]]
"""What the toolkit computes, by the name of the reference it is compared with."""

Value = TypeVar("Value")


class MissingInput(LookupError):
    """The reference set lacks what a quantity is computed from; the message is its name."""


class Reference(dict[str, Value]):
    """What a file of references holds, by name; `[name]` raises MissingInput where it is absent."""

    def __missing__(self, name: str) -> Value:
        raise MissingInput(name)


def read_tensors(path: Path) -> Reference[Tensor]:
    """The tensors of a file. Raises MissingInput where there is none."""
    if not path.exists():
        raise MissingInput(path.name)
    return Reference(load_file(path))


def read_json(path: Path) -> Reference[Any]:
    """The fields of a file. Raises MissingInput where there is none."""
    if not path.exists():
        raise MissingInput(path.name)
    return Reference(json.loads(path.read_text()))


def metadata(path: Path) -> Reference[Any]:
    """What a reference file says of itself."""
    with safe_open(path, "pt") as file:
        return Reference(json.loads((file.metadata() or {}).get("meta", "{}")))


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinity between different shapes and where ours is not a number."""
    if ours.shape != reference.shape or ours.isnan().any():
        return float("inf")
    return (ours.double() - reference.double()).abs().max().item() if ours.numel() else 0.0


def compare(
    name: str,
    expected: Mapping[str, Tensor],
    ours: Ours,
    tolerance: float | Callable[[str, Tensor], float],
    measure: Callable[[Tensor, Tensor], float] = difference,
) -> Iterator[Quantity]:
    """One quantity per reference output; infinity for one that we do not compute.

    tolerance: or a function of the quantity's name and reference. measure: of the difference.
    """
    for key in sorted(expected):
        allowed = tolerance if isinstance(tolerance, float) else tolerance(key, expected[key])
        if key not in ours:
            yield f"{name}.{key}", float("inf"), allowed
            continue
        yield from checked(f"{name}.{key}", partial(lambda key: measure(ours[key](), expected[key]), key), allowed)


def checked(name: str, found: Callable[[], float], tolerance: float) -> Iterator[Quantity]:
    """The quantity, unless the reference set lacks what it is computed from or compared with."""
    try:
        yield name, found(), tolerance
    except MissingInput as missing:
        logger.warning("%s: not checked, %s is absent", name, missing)


def uniform_weights(height: int, width: int) -> Tensor:
    """Weight 1, float64, for each position (height, width) of a tile."""
    return torch.ones(height, width, dtype=torch.float64)
