"""A face found in a photograph, or given by hand."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]
"""(x, y) per row, in pixels; (0, 0) is the centre of the first pixel."""

LandmarkSource = Literal["detector", "given", "template"]


class Box(NamedTuple):
    """Left, top, right and bottom of a face in pixels; may lie partly outside the picture."""

    x1: float
    y1: float
    x2: float
    y2: float

    def area_within(self, height: int, width: int) -> float:
        """Square pixels of the part inside a picture of this size."""
        covered_width = min(self.x2, width) - max(self.x1, 0.0)
        covered_height = min(self.y2, height) - max(self.y1, 0.0)
        return max(covered_width, 0.0) * max(covered_height, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """Where a face is."""

    box: Box
    score: float
    """Confidence of the detector, 0 to 1; 1 for a face given by hand."""
    landmarks: Points
    """(5, 2): left eye, right eye, nose, left and right corner of the mouth, left and right as seen in the picture."""
    landmarks_from: LandmarkSource = "detector"
    """Who placed the landmarks; "template" means an upright face that fills the box was assumed."""

    @property
    def eye_distance(self) -> float:
        """Distance of the eyes in pixels."""
        return float(np.linalg.norm(self.landmarks[0] - self.landmarks[1]))


class FaceDetector(Protocol):
    """Finds faces in a picture."""

    name: str
    """What a report calls it."""

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces in pixels (H, W, 3), RGB, each once, the surest first; an empty list if there is none."""
