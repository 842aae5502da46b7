"""Alignment and selection: goldens are in the parity suite; here what must hold for any face."""

import cv2
import numpy as np
import pytest

from stablesr_kit.errors import ImageError
from stablesr_kit.faces.face import Box, Face, Points, select_faces
from stablesr_kit.faces.geometry import OUTSIDE, align, apply, crop, template, to_enlarged


def turned(size_px: float, degrees: float, x: float, y: float) -> Points:
    """The template's landmarks, scaled to a face of size_px, turned and moved to (x, y)."""
    angle = np.radians(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (template(512) - 256) * size_px / 512
    return points @ rotation.T + np.array([x, y])


def face_at(landmarks: Points) -> Face:
    return Face(box=Box(*landmarks.min(0), *landmarks.max(0)), score=1.0, landmarks=landmarks)


@pytest.mark.parametrize("size_px", [512, 256, 64])
@pytest.mark.parametrize("degrees", [0, 25, -80, 180])
def test_alignment_undoes_any_similarity(size_px: int, degrees: float) -> None:
    landmarks = turned(97, degrees, 140, 77)
    np.testing.assert_allclose(apply(align(landmarks, size_px), landmarks), template(size_px), atol=1e-3)


def test_one_landmark_far_off_does_not_count() -> None:
    landmarks = turned(200, 10, 300, 300)
    spoilt = landmarks.copy()
    spoilt[2] += 80
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(apply(align(spoilt, 512), landmarks)[kept], template(512)[kept], atol=0.5)


def test_eyes_and_mouth_suffice() -> None:
    matrix = align(np.array([(100.0, 100), (163.5, 100), (132.5, 165.5)]), 512)
    np.testing.assert_allclose(matrix[0, 0], 2, rtol=1e-3)


@pytest.mark.parametrize("landmarks", [np.full((5, 2), 7.0), np.full((5, 2), np.nan)])
def test_landmarks_that_fix_no_face_are_refused_in_one_line(landmarks: Points) -> None:
    with pytest.raises(ImageError, match=r"fix no face; give eyes") as raised:
        align(landmarks, 512)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("centre", [(0, 0), (399, 150), (-30, 310)])
def test_faces_at_the_border_show_grey_beyond_it(centre: tuple[float, float]) -> None:
    picture = np.zeros((300, 400, 3), np.float32)
    face = crop(picture, align(turned(120, 0, *centre), 128), 128)
    assert face.shape == (128, 128, 3)
    assert {tuple(corner) for corner in face[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()} & {OUTSIDE}
    assert (face == 0).any()


def test_a_face_outside_the_picture_is_grey_all_over() -> None:
    face = crop(np.zeros((30, 40, 3), np.float32), align(turned(20, 0, 900, -500), 64), 64)
    assert (face == np.float32(OUTSIDE)).all()


def test_large_faces_are_averaged_down() -> None:
    noise = np.random.default_rng(0).normal(128, 40, (1200, 1200, 3)).astype(np.float32)
    face = crop(noise, align(turned(1024, 0, 600, 600), 128), 128)
    assert face[20:-20, 20:-20].std() < 40 / 6  # 8 x 8 pixels each; sampling four of them would leave 20 or more


def test_large_faces_stay_in_place() -> None:
    rows, columns = np.mgrid[:1200, :1300].astype(np.float32)
    picture = np.stack([columns, rows, rows], axis=2)
    matrix = align(turned(1024, 7, 600, 610), 128)
    y, x = np.mgrid[30:100, 30:100]
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
    expected = apply(cv2.invertAffineTransform(matrix), points)
    np.testing.assert_allclose(crop(picture, matrix, 128)[y.ravel(), x.ravel(), :2], expected, atol=0.3)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (3.7, 4.1)])
@pytest.mark.parametrize("face_scale", [1, 2])
def test_the_way_back_meets_the_enlarged_picture_at_pixel_centres(
    scale: tuple[float, float], face_scale: float
) -> None:
    matrix = align(turned(200, 12, 150, 140), 256)
    point = np.array([(143.0, 137.0)])
    on_face = (apply(matrix, point) + 0.5) * face_scale - 0.5
    expected = (point + 0.5) * scale[::-1] - 0.5
    np.testing.assert_allclose(apply(to_enlarged(matrix, scale, face_scale), on_face), expected, atol=1e-6)


def test_the_largest_face_is_the_one_that_covers_most_of_the_picture() -> None:
    cut, whole = face_at(turned(300, 0, -20, 100)), face_at(turned(150, 0, 200, 100))
    assert select_faces([cut, whole], 300, 400, only="largest") == [whole]


def test_the_centre_face_is_the_one_nearest_the_centre() -> None:
    faces = [face_at(turned(80, 0, x, 100)) for x in (60, 190, 330)]
    assert select_faces(faces, 200, 400, only="center") == [faces[1]]


def test_profile_faces_with_the_nose_under_an_eye_are_kept_unless_the_slip_is_asked_for() -> None:
    profile = face_at(np.array([(310.0, 205), (352, 205), (353, 244), (318, 281), (349, 282)]))
    assert select_faces([profile], 600, 600) == [profile]
    assert select_faces([profile], 600, 600, official_quirks=True) == []


def test_faces_with_eyes_too_near_are_left_out() -> None:
    assert select_faces([face_at(turned(18, 0, 50, 50))], 100, 100) == []
    assert select_faces([], 100, 100, only="largest") == []
