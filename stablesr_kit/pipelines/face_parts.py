"""Detectors by name and the parser, with their weights read safely."""

import importlib.util
from pathlib import Path
from typing import Literal

import torch

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import ConfigError
from stablesr_kit.faces.detectors import WEIGHT_FILES, MTCNNDetector, RetinaFaceDetector, YuNetDetector
from stablesr_kit.faces.face import FaceDetector
from stablesr_kit.faces.parse import ParseNetParser

DetectorName = Literal["mtcnn", "retinaface", "yunet"]


def load_detector(name: DetectorName, weights: Path | None = None, device: torch.device | str = "cpu") -> FaceDetector:
    """The detector of that name; nothing is ever downloaded.

    weights: its file; None for mtcnn, which is in the package, and for retinaface if facexlib has a copy.

    Raises:
        ConfigError: a file or an extra is missing, or a file is given to mtcnn; the message says which goes where.
        CheckpointError: the file is of another network.
    """
    if name == "mtcnn":
        if weights is not None:
            raise ConfigError(
                f"{weights} is given, but mtcnn has its weights in the package; leave the file out, or choose the "
                "detector it is for"
            )
        return MTCNNDetector(device=device)
    if name == "yunet":
        if weights is None:
            raise ConfigError(
                "the detector yunet needs its model; give face_detection_yunet_2023mar.onnx of OpenCV's zoo"
            )
        return YuNetDetector(weights)
    backbone: Literal["resnet50", "mobile0.25"] = "resnet50"
    if weights is not None and weights.name == WEIGHT_FILES["mobile0.25"]:
        backbone = "mobile0.25"
    path = weights or _facexlib_copy(WEIGHT_FILES[backbone])
    return RetinaFaceDetector(_tensors(path), backbone, device=device)


def load_parser(weights: Path, device: torch.device | str = "cpu") -> ParseNetParser:
    """ParseNet with the weights of parsing_parsenet.pth.

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the file is missing, unsafe or of another network.
    """
    return ParseNetParser(_tensors(weights), device)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in read_checkpoint(path).content.items() if isinstance(v, torch.Tensor)}


def _facexlib_copy(file_name: str) -> Path:
    spec = importlib.util.find_spec("facexlib")
    if spec is None or spec.origin is None:
        raise ConfigError("the detector retinaface needs facexlib; pip install 'stablesr-kit[faces]', or use mtcnn")
    path = Path(spec.origin).parent / "weights" / file_name
    if not path.is_file():
        raise ConfigError(f"the detector retinaface needs its weights; give {file_name}, or put it at {path}")
    return path
