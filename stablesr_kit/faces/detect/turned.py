"""Faces in photos that lie on their side or stand on their head."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.faces.face import Box, Face, FaceDetector, Points

SURE = 0.99
"""Score of a face that is one: a face that lies on its side may be taken for a worse one that does not."""
LEAST_SCORE = 0.95
"""Of a face in a turned picture: there are three turns to take something else for one."""


def detect_turned(detector: FaceDetector, pixels: NDArray[np.uint8], quarters: int) -> list[Face]:
    """Faces that are upright when pixels (H, W, 3) are turned counterclockwise by quarters, where they are as given."""
    height, width = pixels.shape[:2]
    faces = detector.detect(np.ascontiguousarray(np.rot90(pixels, quarters)))
    return [_turned_back(face, height, width, quarters) for face in faces if face.score >= LEAST_SCORE]


def _turned_back(face: Face, height: int, width: int, quarters: int) -> Face:
    def back(points: Points) -> Points:
        x, y = points.T
        turned = {1: (width - 1 - y, x), 2: (width - 1 - x, height - 1 - y), 3: (y, height - 1 - x)}
        return np.stack(turned[quarters], axis=1)

    corners = back(np.array([face.box[:2], face.box[2:]]))
    box = Box(*corners.min(axis=0), *corners.max(axis=0))
    return replace(face, box=box, landmarks=back(face.landmarks), turned=90 * quarters)
