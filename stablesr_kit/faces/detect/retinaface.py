"""RetinaFace (Deng et al. 2020) as facexlib has it: the detector that the published CodeFormer scripts use."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.faces.face import Face, detection_size, faces_from_rows, suppress

Backbone = Literal["resnet50", "mobile0.25"]

WEIGHT_FILES: dict[Backbone, str] = {
    "resnet50": "detection_Resnet50_Final.pth",
    "mobile0.25": "detection_mobilenet0.25_Final.pth",
}


@dataclass(frozen=True, kw_only=True)
class RetinaFaceOptions:
    """What counts as a face."""

    min_sides_px: tuple[int, ...] = (640, 1280)
    """Smaller sides of the pictures that are searched; those above the first that would enlarge one are left out."""
    threshold: float = 0.8
    """Least score."""
    max_overlap: float = 0.4
    """Shared part of the union from which on two detections are one face."""


class RetinaFaceDetector:
    """Finds faces from frontal to profile, also in bad light; needs the extra `faces` and a weight file.

    state_dict: of the weight file, its keys with or without "module.".

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the weights are of another network.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        backbone: Backbone = "resnet50",
        options: RetinaFaceOptions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            from facexlib.detection.retinaface import RetinaFace
        except ImportError as error:
            raise ConfigError(
                f"the detector retinaface needs facexlib ({error}); pip install 'stablesr-kit[faces]', or use mtcnn"
            ) from error
        self.name = f"retinaface_{backbone}"
        self.options = options or RetinaFaceOptions()
        with warnings.catch_warnings():  # it calls torchvision by arguments of old versions
            warnings.simplefilter("ignore")
            self._network = RetinaFace(network_name=backbone, device=torch.device(device))
        try:
            self._network.load_state_dict({k.removeprefix("module."): v for k, v in state_dict.items()})
        except RuntimeError as error:
            reason = shorten(str(error).splitlines()[-1], 120)
            raise CheckpointError(
                f"these are no weights of {self.name} ({reason}); give {WEIGHT_FILES[backbone]}"
            ) from error

    @torch.no_grad()
    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces in pixels (H, W, 3), RGB, the surest first."""
        height, width = pixels.shape[:2]
        first, *larger = self.options.min_sides_px
        faces: list[Face] = []
        for side in [first, *(side for side in larger if side <= min(height, width))]:
            size, scale = detection_size(height, width, side)
            shrinks = scale < 1
            resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
            rows = self._network.detect_faces(
                resized[..., ::-1], conf_threshold=self.options.threshold, nms_threshold=self.options.max_overlap
            )
            faces += faces_from_rows(rows, scale)
        boxes = np.array([face.box for face in faces]).reshape(-1, 4)
        kept = suppress(boxes, np.array([face.score for face in faces]), self.options.max_overlap)
        return [faces[i] for i in kept]
