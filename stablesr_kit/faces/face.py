"""Faces, found in a photograph or given by hand: positions, duplicates, and which are restored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]
"""(x, y) per row, in pixels; (0, 0) is the centre of the first pixel."""

LandmarkSource = Literal["detector", "given", "template"]
Only = Literal["largest", "center"]


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
    turned: int = 0
    """Degrees, counterclockwise, that the picture was turned by when the face was found."""
    landmarks_from: LandmarkSource = "detector"
    """Where the landmarks come from; "template" assumes an upright face that fills the box."""

    @property
    def eye_distance(self) -> float:
        """Distance of the eyes in pixels."""
        return float(np.linalg.norm(self.landmarks[0] - self.landmarks[1]))


class FaceDetector(Protocol):
    """Finds faces in a picture."""

    name: str
    """Its name in reports."""

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces in pixels (H, W, 3), RGB, each once, the most confident first; may be empty."""


def select_faces(
    faces: Sequence[Face],
    height: int,
    width: int,
    *,
    min_eye_distance: float = 5.0,
    only: Only | None = None,
    official_quirks: bool = False,
) -> list[Face]:
    """The faces whose eyes are more than min_eye_distance pixels apart; with `only`, at most one of them.

    height, width: size of the picture. only: "largest" or "center", the one nearest the picture's centre.
    official_quirks: measure the eyes like the published script, one column off, which drops large profile faces.
    """
    distance = _official_eye_distance if official_quirks else lambda face: face.eye_distance
    large = [face for face in faces if distance(face) > min_eye_distance]
    if only is None or not large:
        return large
    if only == "largest":
        return [max(large, key=lambda face: face.box.area_within(height, width))]
    return [min(large, key=lambda face: _distance_from(face, width / 2, height / 2))]


def _official_eye_distance(face: Face) -> float:
    left, right, nose = face.landmarks[:3]
    return math.hypot(left[1] - right[1], right[0] - nose[0])


def _distance_from(face: Face, x: float, y: float) -> float:
    x1, y1, x2, y2 = face.box
    return math.hypot((x1 + x2) / 2 - x, (y1 + y2) / 2 - y)


def suppress(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    max_overlap: float,
    relative_to: Literal["union", "smaller"] = "union",
) -> NDArray[np.intp]:
    """Indices of the boxes (N, 4) that stay, the highest of their scores (N,) first; ties in the order given.

    max_overlap: a box is removed if its intersection over union with a better one exceeds this (or its intersection
    over the smaller box, which also removes boxes inside boxes).
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


def detection_size(height: int, width: int, min_side_px: int | None) -> tuple[tuple[int, int], float]:
    """((height, width), scale) of the picture a detector sees: its smaller side is min_side_px; None keeps the size."""
    if min_side_px is None:
        return (height, width), 1.0
    scale = min_side_px / min(height, width)
    return (int(height * scale), int(width * scale)), scale


def faces_from_rows(rows: NDArray[np.floating], scale: float, *, official_quirks: bool = False) -> list[Face]:
    """Faces of rows (N, 15): x1, y1, x2, y2, score, five points (x, y); found in a picture `scale` times as large.

    official_quirks: the score is divided by the scale too, as in the published script.
    """
    scaled = np.array(rows, np.float64).reshape(-1, 15) / scale
    scores = scaled[:, 4] if official_quirks else scaled[:, 4] * scale
    return [
        Face(box=Box(*row[:4].tolist()), score=float(score), landmarks=row[5:].reshape(5, 2))
        for row, score in zip(scaled, scores, strict=True)
    ]
