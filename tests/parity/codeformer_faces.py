"""Faces of CodeFormer against `face_align.json` and `face_paste.safetensors`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from stablesr_kit.faces.face import Only, detection_size, faces_from_rows, select_faces
from stablesr_kit.faces.geometry import Matrix, align, crop, inverse, template
from stablesr_kit.faces.parse import parsed_mask
from stablesr_kit.faces.paste import GREEN, is_grey, match_grey, paste_face
from tests.parity.references import Quantity

SIZE_PX = 512
MATRIX_TOLERANCE = 1e-4
CROP_TOLERANCE = 1
PASTE_TOLERANCE = 2
PASTE_MEAN_TOLERANCE = 0.05

# case -> enlargement, parsed or not, face enlargement, background, draws boxes, grey input
_PASTE_CASES = ("up2_square", "up1_parse", "up2_parse", "up2_parse_faceup", "up2_bg", "gray_up1", "box_up2")


def check_align(folder: Path) -> Iterator[Quantity]:
    """(name, difference, tolerance) of each quantity in face_align.json; matrices are compared relatively."""
    reference: dict[str, Any] = json.loads((folder / "face_align.json").read_text())
    for key, ours in {
        "template_512": template(512),
        "template_256": template(256),
        "template_3points": template(512, points=3),
        "template_512_crop_ratio_1.5_1.25": template(512, crop_ratio=(1.5, 1.25)),
    }.items():
        yield f"align.{key}", _largest(ours, reference[key]), 1e-4
    for name, face in reference["sets"].items():
        landmarks = np.array(face["landmarks"])
        matrix = align(landmarks, SIZE_PX)
        yield f"align.{name}.lmeds", _relative(matrix, face["lmeds"]), MATRIX_TOLERANCE
        yield f"align.{name}.inverse", _relative(cv2.invertAffineTransform(matrix), face["inverse"]), MATRIX_TOLERANCE
        (found,) = faces_from_rows(np.array([[0, 0, 1, 1, 1, *landmarks.flatten()]]), 1.0)
        yield f"align.{name}.eye_dist", abs(found.eye_distance - face["eye_dist"]), 1e-6
    yield from _check_detection(reference)


def _check_detection(reference: dict[str, Any]) -> Iterator[Quantity]:
    """The published filters on given rows of a detector; `*.fixed` is the filter without the published slip."""
    height, width = reference["det_img_hw"]
    rows = np.array(reference["det_rows"])
    choices: dict[str, Only | None] = {"center": "center", "largest": "largest"}
    for name, case in reference["det_cases"].items():
        is_resized = case["det_input_shape"][:2] != [height, width]
        size, scale = detection_size(height, width, 640 if is_resized else None)
        yield f"align.{name}.size", _largest(size, case["det_input_shape"][:2]), 0
        faces = faces_from_rows(rows, scale, official_quirks=True)
        kept = select_faces(faces, height, width, only=choices.get(name), official_quirks=True)
        yield f"align.{name}.n", abs(len(kept) - case["n"]), 0
        yield f"align.{name}.landmarks", _largest([face.landmarks for face in kept], case["landmarks"]), 1e-4
        boxes = [[*face.box, face.score] for face in kept]
        yield f"align.{name}.faces", _largest(boxes, np.reshape(case["det_faces"], (-1, 5))), 1e-4


def check_paste(folder: Path) -> Iterator[Quantity]:
    """(name, difference, tolerance) of each quantity in face_paste.safetensors, in 8-bit levels."""
    reference = load_file(folder / "face_paste.safetensors")
    picture, grey = reference["input"], reference["input_gray"]
    matrices = [align(landmarks, SIZE_PX) for landmarks in reference["landmarks"]]
    yield "paste.affine", _relative(matrices, reference["affine"]), MATRIX_TOLERANCE
    enlarged = [cv2.invertAffineTransform(matrix) * 2 for matrix in matrices]
    yield "paste.inverse_affine_x2", _relative(enlarged, reference["inverse_affine_x2"]), MATRIX_TOLERANCE
    cropped = [crop(picture, matrix, SIZE_PX) for matrix in matrices]
    faces = [255 - face for face in cropped]
    for i, face in enumerate(cropped):
        yield f"paste.cropped_face{i}", _largest(face[::4, ::4], reference[f"cropped_face{i}_s4"]), CROP_TOLERANCE
    yield "paste.is_grey", float(is_grey(picture) or not is_grey(grey)), 0

    grey_crops = [crop(grey, matrix, SIZE_PX).astype(np.float32) for matrix in matrices]
    grey_faces = [match_grey(255 - face, face) for face in grey_crops]
    difference = _largest(grey_faces[0][::4, ::4], reference["gray_restored0_s4"])
    yield "paste.gray_restored0", difference, PASTE_TOLERANCE
    mask = parsed_mask(reference["parse_labels_64"].repeat(8, axis=0).repeat(8, axis=1))
    for name in sorted(key for key in reference if key.startswith("out.")):
        case = name.removeprefix("out.")
        if case not in _PASTE_CASES:
            yield f"paste.{name}", float("inf"), PASTE_TOLERANCE
            continue
        inputs = (grey, grey_faces) if case.startswith("gray") else (picture, faces)
        ours = _pasted(case, *inputs, matrices, mask)
        difference = np.abs(ours - reference[name].astype(np.float32))
        yield f"paste.{name}", float(difference.max()), PASTE_TOLERANCE
        yield f"paste.{name}.mean", float(difference.mean()), PASTE_MEAN_TOLERANCE


def _pasted(
    case: str,
    picture: NDArray[np.uint8],
    faces: Sequence[NDArray[np.generic]],
    matrices: Sequence[NDArray[np.float64]],
    mask: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The reference's case by our parts; the published script cuts fractions off where ours rounds."""
    scale = 1 if "up1" in case else 2
    face_scale = 2 if case.endswith("faceup") else 1
    interpolation = cv2.INTER_CUBIC if case == "up2_bg" else cv2.INTER_LINEAR
    background = _enlarged(picture, scale, interpolation).astype(np.float32)
    for face, matrix in zip(faces, matrices, strict=True):
        if face_scale > 1:
            face = _enlarged(face, face_scale, cv2.INTER_CUBIC)
        paste_face(
            background,
            face,
            _official_to_enlarged(matrix, scale, face_scale),
            scale=scale,
            shape="square",
            parsed=None if "square" in case else mask,
            box_colour=GREEN if "box" in case else None,
        )
    return np.floor(background)


def _official_to_enlarged(matrix: Matrix, scale: float, face_scale: float = 1.0) -> Matrix:
    """`to_enlarged` as the published script has it: pixel centres are up to half a pixel off."""
    to_picture = inverse(matrix) * scale
    if face_scale != 1:
        to_picture[:, :2] /= face_scale
    elif scale > 1:
        to_picture[:, 2] += 0.5 * scale
    return to_picture


def _enlarged(picture: NDArray[Any], scale: int, interpolation: int) -> NDArray[Any]:
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=interpolation) if scale > 1 else picture.copy()


def _largest(ours: Any, reference: Any) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(ours - reference).max(initial=0)) if ours.shape == reference.shape else float("inf")


def _relative(ours: Any, reference: Any) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    scale = np.abs(reference).max(axis=(-2, -1), keepdims=True)
    return float((np.abs(ours - reference) / np.maximum(np.abs(reference), 1e-3 * scale)).max())
