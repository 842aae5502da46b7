"""Alignment of a face to the template that face networks are trained on, and the way back."""

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import ImageError
from stablesr_kit.faces.face import Points

Matrix: TypeAlias = NDArray[np.float64]
"""(2, 3): an affine map of points (x, y)."""

TEMPLATE_SIZE_PX = 512

# Eyes, nose and corners of the mouth in an aligned face of 512 x 512 pixels (the FFHQ template of CodeFormer).
FIVE_POINTS = np.array(
    [
        (192.98138, 239.94708),
        (318.90277, 240.1936),
        (256.63416, 314.01935),
        (201.26117, 371.41043),
        (313.08905, 371.15118),
    ]
)
# Eyes and middle of the mouth.
THREE_POINTS = np.array([(192.0, 240.0), (319.0, 240.0), (257.0, 371.0)])

# RGB, in 8-bit levels, of what an aligned face shows beyond the edge of the picture.
OUTSIDE = (132.0, 133.0, 135.0)


def template(size_px: int, points: int = 5, crop_ratio: tuple[float, float] = (1.0, 1.0)) -> Points:
    """Landmarks (5 or 3, 2) of an aligned face in a square of size_px.

    crop_ratio: (height, width) of a larger crop, in sides of the square, with the face in its middle.
    """
    base = (FIVE_POINTS if points == 5 else THREE_POINTS) * (size_px / TEMPLATE_SIZE_PX)
    ratio = np.array(crop_ratio[::-1])
    return np.asarray(base + size_px * (ratio - 1) / 2, np.float64)


def align(landmarks: Points, size_px: int) -> Matrix:
    """Similarity that brings landmarks (5 or 3, 2) to the template in a square of size_px.

    Least median of squares: one landmark that is far off does not count.

    Raises:
        ImageError: the landmarks are not finite, or coincide, and so determine no similarity.
    """
    expected = template(size_px, points=len(landmarks))
    spread = np.ptp(landmarks, axis=0).max() if np.isfinite(landmarks).all() else 0.0
    matrix = cv2.estimateAffinePartial2D(landmarks, expected, method=cv2.LMEDS)[0] if spread > 0 else None
    if matrix is None or not np.isfinite(matrix).all() or np.linalg.det(matrix[:, :2]) < 1e-12:
        raise ImageError(
            f"landmarks {landmarks.round(1).tolist()} fix no face; give eyes, nose and corners of the mouth"
        )
    return np.asarray(matrix, np.float64)


def crop(picture: NDArray[Any], matrix: Matrix, size_px: int) -> NDArray[Any]:
    """The aligned face (size_px, size_px, 3) of a picture (H, W, 3) in 8-bit levels, uint8 or float, bilinear.

    A face more than twice as large is averaged down first. What lies beyond the picture is `OUTSIDE`.
    """
    corners = apply(inverse(matrix), _square(size_px))
    region = covering(corners, picture.shape[0], picture.shape[1])
    if region is None:
        return np.full((size_px, size_px, 3), OUTSIDE, picture.dtype)
    part: NDArray[Any] = np.ascontiguousarray(picture[region])
    to_face = matrix @ _homogeneous(np.array([[1.0, 0.0, region[1].start], [0.0, 1.0, region[0].start]]))
    shrink = int(1 / np.sqrt(np.linalg.det(matrix[:, :2])))
    if shrink >= 2:
        height, width = (max(side // shrink, 1) for side in part.shape[:2])
        enlarge = scaling(part.shape[0] / height, part.shape[1] / width)
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
        to_face = to_face @ _homogeneous(enlarge)
    return cv2.warpAffine(part, to_face, (size_px, size_px), borderMode=cv2.BORDER_CONSTANT, borderValue=OUTSIDE)


def shown_in(aligned: NDArray[Any]) -> NDArray[np.bool_]:
    """Where (S, S) an aligned face (S, S, 3) in 8-bit levels shows the picture, and not what lies beyond."""
    shown: NDArray[np.bool_] = (aligned != np.array(OUTSIDE, aligned.dtype)).any(axis=2)
    return shown


def to_enlarged(matrix: Matrix, scale: tuple[float, float], face_scale: float = 1.0) -> Matrix:
    """Map from the pixels of a restored face to those of the enlarged picture.

    matrix: of `align`, from the picture before it was enlarged. scale: (vertical, horizontal) enlargement of the
    picture. face_scale: how much larger the restored face is than the aligned one.
    """
    to_picture = inverse(matrix)
    shrink_face = scaling(1 / face_scale, 1 / face_scale)
    return np.asarray(scaling(*scale) @ _homogeneous(to_picture) @ _homogeneous(shrink_face), np.float64)


def inverse(matrix: Matrix) -> Matrix:
    """The inverse map."""
    return np.asarray(cv2.invertAffineTransform(matrix), np.float64)


def scaling(vertical: float, horizontal: float) -> Matrix:
    """The map of pixel centres when a picture is resized."""
    return np.array([[horizontal, 0, (horizontal - 1) / 2], [0, vertical, (vertical - 1) / 2]])


def apply(matrix: Matrix, points: Points) -> Points:
    """The points (N, 2) mapped."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def covering(points: Points, height: int, width: int, margin_px: int = 2) -> tuple[slice, slice] | None:
    """Rows and columns of a picture of this size that hold the points and a margin; None if they miss the picture."""
    low = np.floor(points.min(axis=0)).astype(int) - margin_px
    high = np.ceil(points.max(axis=0)).astype(int) + margin_px + 1
    left, top = np.maximum(low, 0).tolist()
    right, bottom = np.minimum(high, (width, height)).tolist()
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def _square(size_px: int) -> Points:
    last = size_px - 1.0
    return np.array([(0.0, 0.0), (last, 0.0), (0.0, last), (last, last)])


def _homogeneous(matrix: Matrix) -> NDArray[np.float64]:
    return np.vstack([matrix, np.array([(0.0, 0.0, 1.0)])])
