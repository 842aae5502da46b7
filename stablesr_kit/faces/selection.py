"""Which of the faces found are restored."""

import math
from collections.abc import Sequence
from typing import Literal

from stablesr_kit.faces.face import Face

Only = Literal["largest", "center"]


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

    height, width: size of the picture. only: the one that covers most of the picture, or the one nearest its centre.
    official_quirks: measure the eyes as the published script does, a column too far, which drops large profile faces.
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
