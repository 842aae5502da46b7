"""Finding tensors by name, with an error that says what is absent."""

import re
from collections.abc import Mapping

from torch import Tensor

from stablesr_kit.errors import CheckpointError


def indices(names: Mapping[str, Tensor], pattern: str) -> set[int]:
    """The numbers that the pattern's first group finds."""
    return {int(match[1]) for match in (re.search(pattern, name) for name in names) if match}


def first(names: Mapping[str, Tensor], pattern: str, otherwise: str) -> str:
    """The first name that the pattern finds. Raises `CheckpointError` with the text `otherwise` if there is none."""
    for name in names:
        if re.search(pattern, name):
            return name
    raise CheckpointError(otherwise)


def shape(part: Mapping[str, Tensor], name: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor that every network called `what` has. Raises `CheckpointError` if it is absent."""
    if name not in part:
        raise CheckpointError(f"{what} lacks {name}; the file is incomplete or of another family")
    return tuple(part[name].shape)
