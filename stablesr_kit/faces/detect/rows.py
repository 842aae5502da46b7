"""Rows of numbers, as RetinaFace and YuNet give them, as faces of the picture."""

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.faces.face import Box, Face


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
