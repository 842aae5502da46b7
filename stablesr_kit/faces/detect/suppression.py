"""One box per face: of boxes that overlap, the surest stays."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def suppress(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    max_overlap: float,
    relative_to: Literal["union", "smaller"] = "union",
) -> NDArray[np.intp]:
    """Indices of the boxes (N, 4) that stay, the highest of their scores (N,) first; ties in the order given.

    max_overlap: a box goes if it shares more than this part of the union (or of the smaller box, which also removes
    boxes inside boxes) with a surer one.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)
    rest = np.argsort(-scores, kind="stable")
    kept = []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        corner = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (corner - np.maximum(boxes[best, :2], boxes[rest, :2])).clip(0).prod(axis=1)
        base = np.minimum(areas[best], areas[rest])
        if relative_to == "union":
            base = areas[best] + areas[rest] - shared
        rest = rest[shared <= max_overlap * base]
    return np.array(kept, np.intp)
