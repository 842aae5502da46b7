"""Faces of CodeFormer against `face_align.json` and `face_paste.safetensors`."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from stablesr_kit.faces.face import Face, Only, detection_size, faces_from_rows, select_faces
from stablesr_kit.faces.geometry import Matrix, align, crop, inverse, template
from stablesr_kit.faces.paste import GREEN, is_grey, match_grey, parsed_mask, paste_face
from tests.parity.references import Quantity, Reference, checked, read_json

SIZE_PX = 512
MATRIX_TOLERANCE = 1e-4
CROP_TOLERANCE = 1
PASTE_TOLERANCE = 2
PASTE_MEAN_TOLERANCE = 0.05

# case -> enlargement, parsed or not, face enlargement, background, draws boxes, grey input
_PASTE_CASES = ("up2_square", "up1_parse", "up2_parse", "up2_parse_faceup", "up2_bg", "gray_up1", "box_up2")


def check_align(folder: Path) -> Iterator[Quantity]:
    """(name, difference, tolerance) of each quantity in face_align.json; matrices are compared relatively."""
    reference = read_json(folder / "face_align.json")
    for key, ours in {
        "template_512": template(512),
        "template_256": template(256),
        "template_3points": template(512, points=3),
        "template_512_crop_ratio_1.5_1.25": template(512, crop_ratio=(1.5, 1.25)),
    }.items():
        if key in reference:
            yield f"align.{key}", _largest(ours, reference[key]), 1e-4
    for name, face in reference.get("sets", {}).items():
        yield from _check_face(f"align.{name}", Reference(face))
    for name, case in reference.get("det_cases", {}).items():
        yield from _check_detection(name, Reference(case), reference)


def _check_face(name: str, face: Reference[Any]) -> Iterator[Quantity]:
    """The similarity that brings five landmarks to the template."""

    def matrix() -> Matrix:
        return align(np.array(face["landmarks"]), SIZE_PX)

    def eye_distance() -> float:
        (found,) = faces_from_rows(np.array([[0, 0, 1, 1, 1, *np.ravel(face["landmarks"])]]), 1.0)
        return abs(found.eye_distance - face["eye_dist"])

    quantities: dict[str, tuple[Callable[[], float], float]] = {
        "lmeds": (lambda: _relative(matrix(), face["lmeds"]), MATRIX_TOLERANCE),
        "inverse": (lambda: _relative(cv2.invertAffineTransform(matrix()), face["inverse"]), MATRIX_TOLERANCE),
        "eye_dist": (eye_distance, 1e-6),
    }
    for key, (found, tolerance) in quantities.items():
        if key in face:
            yield from checked(f"{name}.{key}", found, tolerance)


def _check_detection(name: str, case: Reference[Any], reference: Reference[Any]) -> Iterator[Quantity]:
    """The published filters on given rows of a detector."""
    choices: dict[str, Only | None] = {"center": "center", "largest": "largest"}

    @cache
    def size_and_scale() -> tuple[tuple[int, int], float]:
        height, width = reference["det_img_hw"]
        is_resized = case["det_input_shape"][:2] != [height, width]
        return detection_size(height, width, 640 if is_resized else None)

    @cache
    def kept() -> list[Face]:
        faces = faces_from_rows(np.array(reference["det_rows"]), size_and_scale()[1], official_quirks=True)
        return select_faces(faces, *reference["det_img_hw"], only=choices.get(name), official_quirks=True)

    def boxes() -> float:
        return _largest([[*face.box, face.score] for face in kept()], np.reshape(case["det_faces"], (-1, 5)))

    quantities: dict[str, tuple[str, Callable[[], float], float]] = {
        "size": ("det_input_shape", lambda: _largest(size_and_scale()[0], case["det_input_shape"][:2]), 0),
        "n": ("n", lambda: abs(len(kept()) - case["n"]), 0),
        "landmarks": ("landmarks", lambda: _largest([face.landmarks for face in kept()], case["landmarks"]), 1e-4),
        "faces": ("det_faces", boxes, 1e-4),
    }
    for key, (stated, found, tolerance) in quantities.items():
        if stated in case:
            yield from checked(f"align.{name}.{key}", found, tolerance)


def check_paste(folder: Path) -> Iterator[Quantity]:
    """(name, difference, tolerance) of each quantity in face_paste.safetensors, in 8-bit levels."""
    reference: Reference[NDArray[Any]] = Reference(load_file(folder / "face_paste.safetensors"))

    @cache
    def matrices() -> list[Matrix]:
        return [align(landmarks, SIZE_PX) for landmarks in reference["landmarks"]]

    def enlarged() -> list[NDArray[Any]]:
        return [cv2.invertAffineTransform(matrix) * 2 for matrix in matrices()]

    @cache
    def cropped() -> list[NDArray[Any]]:
        return [crop(reference["input"], matrix, SIZE_PX) for matrix in matrices()]

    @cache
    def grey_faces() -> list[NDArray[Any]]:
        crops = [crop(reference["input_gray"], matrix, SIZE_PX).astype(np.float32) for matrix in matrices()]
        return [match_grey(255 - face, face) for face in crops]

    def crop_difference(number: int) -> float:
        return _largest(cropped()[number][::4, ::4], reference[f"cropped_face{number}_s4"])

    @cache
    def pasted(case: str) -> NDArray[np.float32]:
        is_grey_case = case.startswith("gray")
        picture = reference["input_gray" if is_grey_case else "input"]
        faces = grey_faces() if is_grey_case else [255 - face for face in cropped()]
        mask = None
        if "square" not in case:
            mask = parsed_mask(reference["parse_labels_64"].repeat(8, axis=0).repeat(8, axis=1))
        difference: NDArray[np.float32] = np.abs(
            _pasted(case, picture, faces, matrices(), mask) - reference[f"out.{case}"].astype(np.float32)
        )
        return difference

    def largest(case: str) -> float:
        return float(pasted(case).max())

    def mean(case: str) -> float:
        return float(pasted(case).mean())

    quantities: dict[str, tuple[str, Callable[[], float], float]] = {
        "affine": ("affine", lambda: _relative(matrices(), reference["affine"]), MATRIX_TOLERANCE),
        "inverse_affine_x2": (
            "inverse_affine_x2",
            lambda: _relative(enlarged(), reference["inverse_affine_x2"]),
            MATRIX_TOLERANCE,
        ),
        "is_grey": (
            "input_gray",
            lambda: float(is_grey(reference["input"]) or not is_grey(reference["input_gray"])),
            0,
        ),
        "gray_restored0": (
            "gray_restored0_s4",
            lambda: _largest(grey_faces()[0][::4, ::4], reference["gray_restored0_s4"]),
            PASTE_TOLERANCE,
        ),
    }
    for key in reference:
        if number := re.fullmatch(r"cropped_face(\d+)_s4", key):
            quantities[key.removesuffix("_s4")] = key, partial(crop_difference, int(number[1])), CROP_TOLERANCE
    for key, (stated, found, tolerance) in quantities.items():
        if stated in reference:
            yield from checked(f"paste.{key}", found, tolerance)
    for name in sorted(key for key in reference if key.startswith("out.")):
        case = name.removeprefix("out.")
        if case not in _PASTE_CASES:
            yield f"paste.{name}", float("inf"), PASTE_TOLERANCE
            continue
        yield from checked(f"paste.{name}", partial(largest, case), PASTE_TOLERANCE)
        yield from checked(f"paste.{name}.mean", partial(mean, case), PASTE_MEAN_TOLERANCE)


def _pasted(
    case: str,
    picture: NDArray[np.uint8],
    faces: Sequence[NDArray[np.generic]],
    matrices: Sequence[NDArray[np.float64]],
    mask: NDArray[np.float32] | None,
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
            parsed=mask,
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
