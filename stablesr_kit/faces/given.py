"""Faces given by hand in a JSON file: boxes, or landmarks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.faces.detectors import MTCNNDetector
from stablesr_kit.faces.face import Box, Face, Points
from stablesr_kit.faces.geometry import template

_EXPECTED = (
    '{"photo.jpg": [{"landmarks": [[x, y], ...5]}, {"box": [x1, y1, x2, y2]}]}, in pixels of the photo; '
    "landmarks are left and right eye as seen in the photo, nose, left and right corner of the mouth, or eyes and mouth"
)
# The face's extent in the aligned square, in sides: forehead to chin, cheek to cheek.
_FACE_IN_SQUARE = (0.23, 0.17, 0.77, 0.90)


def read_given_faces(path: Path) -> dict[str, list[Box | Points]]:
    """Boxes and landmarks ((5, 2) or (3, 2)) by the name of their photo.

    Raises:
        ConfigError: the file does not exist or is malformed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a JSON file of faces") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); expected {_EXPECTED}") from error
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise ConfigError(f"{path}: not faces by photo; expected {_EXPECTED}")
    return {name: [_parsed(path, name, entry) for entry in entries] for name, entries in content.items()}


def place_given_faces(pixels: NDArray[np.uint8], given: Sequence[Box | Points], detector: MTCNNDetector) -> list[Face]:
    """Faces at the given boxes or landmarks in pixels (H, W, 3); a box gets landmarks from the detector's last network.

    If that network sees no face in the box, an upright face that fills the box is assumed (landmarks_from "template").

    Raises:
        ImageError: a face lies outside the picture, is smaller than a pixel or far larger than the picture.
    """
    height, width = pixels.shape[:2]
    faces = []
    for one in given:
        box = one if isinstance(one, Box) else Box(*one.min(axis=0).tolist(), *one.max(axis=0).tolist())
        _check_place(box, height, width)
        if not isinstance(one, Box):
            faces.append(Face(box=box, score=1.0, landmarks=one, landmarks_from="given"))
            continue
        scores, landmarks = detector.landmarks_in(pixels, [one])
        is_seen = scores[0] > 0.5
        points = landmarks[0] if is_seen else _upright(one)
        faces.append(Face(box=one, score=1.0, landmarks=points, landmarks_from="detector" if is_seen else "template"))
    return faces


def _check_place(box: Box, height: int, width: int) -> None:
    picture = f"the picture, {height} pixels high and {width} wide"
    if box.x2 < 0 or box.y2 < 0 or box.x1 > width - 1 or box.y1 > height - 1:
        raise ImageError(
            f"a given face at ({box.x1:g}, {box.y1:g}) to ({box.x2:g}, {box.y2:g}) lies outside {picture}; "
            "give x before y, in pixels of the photo"
        )
    side = max(box.x2 - box.x1, box.y2 - box.y1)
    if not 1 <= side <= 2 * max(height, width):
        raise ImageError(
            f"a given face of {side:g} pixels is in no proportion to {picture}; "
            "expected at least one pixel and at most twice the picture"
        )


def _parsed(path: Path, name: str, entry: Any) -> Box | Points:
    try:
        (kind, values), *others = entry.items()
        numbers = np.array(values, np.float64)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: {name}: {_shown(entry)} is no face; expected {_EXPECTED}") from error
    is_finite = not others and np.isfinite(numbers).all()
    if is_finite and kind == "box" and numbers.shape == (4,) and (numbers[2:] > numbers[:2]).all():
        return Box(*numbers.tolist())
    if is_finite and kind == "landmarks" and numbers.shape in ((5, 2), (3, 2)) and not _is_mirrored(numbers):
        return numbers
    raise ConfigError(f"{path}: {name}: {_shown(entry)} is no face; expected {_EXPECTED}")


def _shown(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_mirrored(landmarks: Points) -> bool:
    """Whether the mouth lies on the wrong side of the line from the left eye to the right one, however it is turned."""
    mouth = landmarks[3:] if len(landmarks) == 5 else landmarks[2:]
    eyes, down = landmarks[1] - landmarks[0], mouth.mean(axis=0) - landmarks[:2].mean(axis=0)
    return bool(eyes[0] * down[1] < eyes[1] * down[0])


def _upright(box: Box) -> Points:
    """Landmarks of an upright face that fills the box."""
    x1, y1, x2, y2 = _FACE_IN_SQUARE
    side = max((box.x2 - box.x1) / (x2 - x1), (box.y2 - box.y1) / (y2 - y1))
    centre = np.array([(box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2])
    return np.asarray(template(1) * side + centre - side * np.array([(x1 + x2) / 2, (y1 + y2) / 2]))
