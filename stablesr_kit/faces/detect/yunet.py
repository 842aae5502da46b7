"""YuNet (Wu et al. 2023) as OpenCV runs it: small and quick, from a model file that OpenCV's model zoo has."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import CheckpointError
from stablesr_kit.faces.face import Face, faces_from_rows


class YuNetDetector:
    """Finds faces with OpenCV's FaceDetectorYN.

    model: the .onnx file (face_detection_yunet_2023mar.onnx). threshold: least score. max_overlap: shared part of the
    union from which on two detections are one face. max_side_px: larger pictures are searched at this size; YuNet
    looks for faces of 10 to 300 pixels.

    Raises:
        CheckpointError: the file is not such a model.
    """

    name = "yunet"

    def __init__(self, model: Path, threshold: float = 0.8, max_overlap: float = 0.3, max_side_px: int = 1280) -> None:
        if not model.is_file():
            raise CheckpointError(f"{model}: no such file; expected face_detection_yunet_2023mar.onnx of OpenCV's zoo")
        try:
            self._network = cv2.FaceDetectorYN.create(str(model), "", (320, 320), threshold, max_overlap)
        except cv2.error as error:
            raise CheckpointError(
                f"{model}: OpenCV cannot read it as YuNet ({error.err}); give face_detection_yunet_2023mar.onnx"
            ) from error
        self.max_side_px = max_side_px

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces in pixels (H, W, 3), RGB, the surest first."""
        height, width = pixels.shape[:2]
        scale = min(1.0, self.max_side_px / max(height, width))
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        self._network.setInputSize(size)
        _, found = self._network.detect(resized[..., ::-1])
        if found is None:
            return []
        # x, y, width, height, five points from the eye on the left, score
        rows = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4], found[:, 14:], found[:, 4:14]], axis=1)
        return sorted(faces_from_rows(rows, scale), key=lambda face: -face.score)
