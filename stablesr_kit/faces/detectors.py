"""Where the faces of a photo are: detectors, and faces given by hand in a JSON file.

Detectors: MTCNN with weights in the package, RetinaFace as the CodeFormer scripts use it, YuNet of OpenCV.

MTCNN is three small networks that find faces and five landmarks (Zhang et al. 2016). RetinaFace (Deng et al. 2020) is
that of facexlib. YuNet (Wu et al. 2023) is small and quick; its model file is in OpenCV's model zoo.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from stablesr_kit.errors import CheckpointError, ConfigError, ImageError
from stablesr_kit.faces.face import Box, Face, FaceDetector, Points, detection_size, faces_from_rows, suppress
from stablesr_kit.faces.geometry import template

WINDOW_PX = 12
STRIDE_PX = 2


class ProposalNetwork(nn.Module):
    """P-Net: slides a window of 12 x 12 pixels over a picture in steps of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.score, self.offsets = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, h, w), 0 to 1, and offsets of the windows' edges (B, 4, h, w) in windows.

        x: (B, 3, H, W) in [-1, 1].
        """
        x = self.pool(self.prelu1(self.conv1(x)))
        x = self.prelu2(self.conv2(x))
        x = self.prelu3(self.conv3(x))
        return self.score(x).softmax(1)[:, 1], self.offsets(x)


class RefinementNetwork(nn.Module):
    """R-Net: judges patches of 24 x 24 pixels."""

    size_px = 24

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.dense, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.score, self.offsets = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B,), 0 to 1, and offsets of the boxes' edges (B, 4) in box sizes; x: (B, 3, 24, 24) in [-1, 1]."""
        x = self.pool(self.prelu1(self.conv1(x)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense(x.flatten(1)))
        return self.score(x).softmax(1)[:, 1], self.offsets(x)


class OutputNetwork(nn.Module):
    """O-Net: judges patches of 48 x 48 pixels and places five landmarks."""

    size_px = 48

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.dense, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.score, self.offsets, self.landmarks = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B,), offsets (B, 4) as the R-Net's, and landmarks (B, 5, 2), (x, y) in box sizes from its corner.

        x: (B, 3, 48, 48) in [-1, 1].
        """
        x = self.pool(self.prelu1(self.conv1(x)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense(x.flatten(1)))
        return self.score(x).softmax(1)[:, 1], self.offsets(x), self.landmarks(x).view(-1, 2, 5).mT


@dataclass(frozen=True, kw_only=True)
class MTCNNOptions:
    """What counts as a face."""

    min_face_px: float = 20.0
    """Smallest side of a face that is looked for."""
    pyramid_factor: float = 0.709
    """Size of one scale relative to the one before."""
    thresholds: tuple[float, float, float] = (0.6, 0.7, 0.85)
    """Lowest accepted scores of the three networks. For the third, 0.9 misses two of 592 portraits; 0.8 finds more
    objects than faces in addition."""
    max_candidates: int = 20_000
    """Largest number of windows, the most confident ones, that the second network gets."""
    batch_size: int = 512
    """Patches per forward."""
    strip_px: int = 1024
    """Rows of one forward of the first network; bounds the memory, not the result. Even."""


class MTCNNDetector:
    """Finds upright and slightly turned faces with the three networks; deterministic, no file needed.

    The weights are those of the `mtcnn` distribution (MIT licence), converted; see assets/mtcnn/NOTICE.
    """

    name = "mtcnn"

    def __init__(self, options: MTCNNOptions | None = None, device: torch.device | str = "cpu") -> None:
        self.options = options or MTCNNOptions()
        self.device = torch.device(device)
        self.proposal = _loaded(ProposalNetwork).to(self.device)
        self.refinement = _loaded(RefinementNetwork).to(self.device)
        self.output = _loaded(OutputNetwork).to(self.device)

    @torch.no_grad()
    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces in pixels (H, W, 3), RGB, the surest first."""
        _, second, third = self.options.thresholds
        boxes, _ = self._propose(pixels)

        squares = squared(boxes)
        scores, offsets = self._run(self.refinement, pixels, squares)
        boxes = moved(squares, offsets)[scores > second]
        boxes = boxes[suppress(boxes, scores[scores > second], 0.7)]

        squares = squared(boxes)
        scores, offsets, landmarks = self._run(self.output, pixels, squares)
        found = scores > third
        boxes, points = moved(squares, offsets)[found], placed(squares, landmarks)[found]
        scores = scores[found]
        # A face inside a face is the same face, found at another scale.
        kept = suppress(boxes, scores, 0.6, relative_to="smaller")
        return [Face(box=Box(*boxes[i].tolist()), score=float(scores[i]), landmarks=points[i]) for i in kept]

    @torch.no_grad()
    def landmarks_in(self, pixels: NDArray[np.uint8], boxes: Sequence[Box]) -> tuple[NDArray[np.float64], Points]:
        """Scores (N,) and landmarks (N, 5, 2) that the last network gives for boxes around faces."""
        squares = squared(np.array(boxes, np.float64).reshape(-1, 4))
        scores, _, landmarks = self._run(self.output, pixels, squares)
        return scores, placed(squares, landmarks)

    def _propose(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Boxes (N, 4) and scores (N,) of the first network over all scales."""
        boxes, scores = [np.empty((0, 4))], [np.empty(0)]
        for level in pyramid(pixels, self.options):
            level_boxes, level_scores = self._propose_at(level)
            kept = suppress(level_boxes, level_scores, 0.5)
            scale = np.array([pixels.shape[1] / level.shape[1], pixels.shape[0] / level.shape[0]])
            boxes.append(level_boxes[kept] * np.tile(scale, 2))
            scores.append(level_scores[kept])
        all_boxes, all_scores = np.concatenate(boxes), np.concatenate(scores)
        kept = suppress(all_boxes, all_scores, 0.7)[: self.options.max_candidates]
        return all_boxes[kept], all_scores[kept]

    def _propose_at(self, level: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        boxes, scores = [], []
        strip_px = self.options.strip_px
        for top in range(0, level.shape[0] - WINDOW_PX + 1, strip_px):
            strip = level[top : top + strip_px + WINDOW_PX - STRIDE_PX]
            score, offsets = (part[0].cpu().double().numpy() for part in self.proposal(self._normalised([strip])))
            rows, columns = np.nonzero(score > self.options.thresholds[0])
            corners = np.stack([columns * STRIDE_PX, rows * STRIDE_PX + top], axis=1).astype(np.float64)
            windows = np.concatenate([corners, corners + WINDOW_PX], axis=1)
            boxes.append(windows + WINDOW_PX * offsets[:, rows, columns].T)
            scores.append(score[rows, columns])
        order = np.argsort(-np.concatenate(scores), kind="stable")[: self.options.max_candidates]
        return np.concatenate(boxes)[order], np.concatenate(scores)[order]

    def _run(
        self, network: RefinementNetwork | OutputNetwork, pixels: NDArray[np.uint8], squares: NDArray[np.float64]
    ) -> list[NDArray[np.float64]]:
        """The network's outputs for the picture inside each square (N, 4), in batches."""
        patches = [cut(pixels, square, network.size_px) for square in squares.round().astype(int)]
        size = network.size_px
        batches = [patches[i : i + self.options.batch_size] for i in range(0, len(patches), self.options.batch_size)]
        outputs = [network(self._normalised(batch)) for batch in batches]
        if not outputs:
            outputs = [network(torch.zeros((0, 3, size, size), device=self.device))]
        return [torch.cat(part).cpu().double().numpy() for part in zip(*outputs, strict=True)]

    def _normalised(self, patches: Sequence[NDArray[np.uint8]]) -> Tensor:
        batch = torch.from_numpy(np.stack(patches)).to(self.device).permute(0, 3, 1, 2).float()
        return (batch - 127.5) / 128


def pyramid(pixels: NDArray[np.uint8], options: MTCNNOptions) -> Iterator[NDArray[Any]]:
    """The picture at decreasing scales: in the first, a face of `min_face_px` fills a window of the first network."""
    scale = WINDOW_PX / options.min_face_px
    height, width = pixels.shape[:2]
    while min(height, width) * scale >= WINDOW_PX:
        size = (round(width * scale), round(height * scale))
        yield cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        scale *= options.pyramid_factor


def squared(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The boxes (N, 4) widened or heightened to squares of whole pixels around their centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = np.maximum((boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=1), 1).round()[:, None]
    corner = (centre - side / 2).round()
    return np.concatenate([corner, corner + side], axis=1)


def moved(boxes: NDArray[np.float64], offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """The boxes (N, 4) with edges moved by offsets (N, 4) in box sizes."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate([size, size], axis=1)


def placed(boxes: NDArray[np.float64], landmarks: NDArray[np.float64]) -> Points:
    """Landmarks (N, 5, 2), in box sizes from the boxes' corners, in pixels of the picture."""
    size = boxes[:, None, 2:] - boxes[:, None, :2]
    return boxes[:, None, :2] + landmarks * size - 0.5


def cut(pixels: NDArray[np.uint8], box: NDArray[np.int_], size_px: int) -> NDArray[Any]:
    """The picture inside a box, resized to a square of size_px; black where the box leaves the picture."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = box.tolist()
    inside = pixels[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    patch = np.zeros((y2 - y1, x2 - x1, 3), np.uint8)
    top, left = max(-y1, 0), max(-x1, 0)
    patch[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    shrinks = patch.shape[0] > size_px
    return cv2.resize(patch, (size_px, size_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


Network = TypeVar("Network", bound=nn.Module)


@cache
def _weights() -> dict[str, Tensor]:
    return load((resources.files("stablesr_kit") / "assets" / "mtcnn" / "mtcnn.safetensors").read_bytes())


def _loaded(kind: type[Network]) -> Network:
    network = kind()
    prefix = f"{kind.__name__}."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in _weights().items() if k.startswith(prefix)})
    return network.eval()


Backbone = Literal["resnet50", "mobile0.25"]

WEIGHT_FILES: dict[Backbone, str] = {
    "resnet50": "detection_Resnet50_Final.pth",
    "mobile0.25": "detection_mobilenet0.25_Final.pth",
}


@dataclass(frozen=True, kw_only=True)
class RetinaFaceOptions:
    """What counts as a face."""

    min_sides_px: tuple[int, ...] = (640, 1280)
    """Shorter sides to which a picture is resized for the search; of those that enlarge it, only the first is used."""
    threshold: float = 0.8
    """Least score."""
    max_overlap: float = 0.4
    """Intersection over union from which on two detections are one face."""


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


class YuNetDetector:
    """Finds faces with OpenCV's FaceDetectorYN.

    model: the .onnx file (face_detection_yunet_2023mar.onnx). threshold: least score. max_overlap: intersection over
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


SURE = 0.99
"""Score of a certain face. A lying face may be detected as an upright one, but with a lower score."""
LEAST_SCORE = 0.95
"""Lowest score in a turned picture: each of the three turns is another chance of a false detection."""


def detect_turned(detector: FaceDetector, pixels: NDArray[np.uint8], quarters: int) -> list[Face]:
    """Faces that are upright after quarter turns of the pixels (H, W, 3); positions are in the picture as given."""
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
