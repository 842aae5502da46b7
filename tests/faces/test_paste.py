"""Pasting back: the rest of the picture is untouched, seams are soft, regions give what whole pictures give."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from stablesr_kit.faces.geometry import Matrix
from stablesr_kit.faces.paste import MaskShape, is_grey, match_grey, oval, parsed_mask, paste_face

# A face of 64 pixels, turned a little, with its corner at (90, 40).
TO_PICTURE: Matrix = np.array([[1.1, -0.2, 90.3], [0.2, 1.1, 40.7]])


def noise(*shape: int, dtype: type = np.float32, seed: int = 0) -> NDArray[np.generic]:
    values = np.random.default_rng(seed).integers(0, 256, shape)
    return (values * (257 if dtype is np.uint16 else 1)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", ["oval", "square"])
def test_pixels_outside_the_mask_stay_bitwise_as_they_are(dtype: type, shape: MaskShape) -> None:
    before = noise(200, 300, 3, dtype=dtype)
    picture = before.copy()
    paste_face(picture, noise(64, 64, 3, dtype=dtype, seed=1), TO_PICTURE, shape=shape)
    mask = oval(64) if shape == "oval" else np.ones((64, 64), np.float32)
    warped = cv2.warpAffine(mask, TO_PICTURE, (300, 200))
    # The published square is blurred a pixel beyond its border.
    outside = (warped if shape == "oval" else cv2.dilate(warped, np.ones((3, 3)))) == 0
    assert 0.9 < outside.mean() < 0.95
    assert (picture[outside] == before[outside]).all()
    assert (picture[~outside] != before[~outside]).mean() > 0.4
    assert picture.dtype == dtype


def test_alpha_is_kept() -> None:
    picture = noise(200, 300, 4, dtype=np.uint8)
    before = picture.copy()
    paste_face(picture, np.full((64, 64, 3), 255, np.uint8), TO_PICTURE)
    assert (picture[..., 3] == before[..., 3]).all()
    assert (picture[..., :3] != before[..., :3]).any()


def test_a_region_gets_what_the_same_place_of_a_smaller_picture_gets() -> None:
    small = noise(200, 300, 3)
    large = np.zeros((900, 1200, 3), np.float32)
    large[500:700, :300] = small
    face = noise(64, 64, 3, seed=1)
    paste_face(small, face, TO_PICTURE)
    paste_face(large, face, TO_PICTURE + np.array([[0, 0, 0], [0, 0, 500]]))
    assert (large[500:700, :300] == small).all()


@pytest.mark.parametrize("size_px", [64, 512])
@pytest.mark.parametrize("side_px", [150, 1900])
def test_a_drawn_box_is_as_thin_for_faces_of_any_size(size_px: int, side_px: int) -> None:
    picture = np.zeros((side_px + 40, side_px + 40, 3), np.float32)
    enlarge = side_px / size_px
    to_picture = np.array([[enlarge, 0, 20], [0, enlarge, 20]])
    paste_face(picture, np.zeros((size_px, size_px, 3), np.float32), to_picture, box_colour=(200, 200, 200))
    assert 2 < picture[: side_px // 2, side_px // 2, 0].sum() / 200 < 3.1 + enlarge


def test_the_seam_is_softer_than_any_edge_of_the_face() -> None:
    picture = np.zeros((600, 600, 3), np.float32)
    paste_face(picture, np.full((512, 512, 3), 200, np.float32), np.array([[1.0, 0, 40], [0, 1.0, 40]]), shape="oval")
    assert picture.max() == 200
    assert np.abs(np.diff(picture[..., 0], axis=0)).max() < 200 * 0.03
    assert np.abs(np.diff(picture[..., 0], axis=1)).max() < 200 * 0.03


def test_values_are_rounded_to_the_nearest_level_and_clipped() -> None:
    picture = np.full((100, 100, 3), 10, np.uint8)
    identity = np.array([[1.0, 0, 10], [0, 1.0, 10]])
    paste_face(picture, np.full((64, 64, 3), 20.6, np.float32), identity)
    assert picture[44, 42].tolist() == [21, 21, 21]
    paste_face(picture, np.full((64, 64, 3), 300.0, np.float32), identity)
    assert picture[44, 42].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("x", "y"), [(-1000, 5), (-40, -40), (280, 190), (299.4, 10)])
def test_faces_at_and_beyond_the_border_are_pasted_as_far_as_they_are_inside(x: float, y: float) -> None:
    picture = noise(200, 300, 3)
    before = picture.copy()
    paste_face(picture, noise(64, 64, 3, seed=1), np.array([[1.0, 0, x], [0, 1.0, y]]), shape="square")
    assert np.isfinite(picture).all()
    assert (picture != before).any() == (-64 < x < 298)


def test_a_face_of_a_few_pixels_is_pasted() -> None:
    picture = np.zeros((50, 50, 3), np.float32)
    paste_face(picture, np.full((512, 512, 3), 100, np.float32), np.array([[0.02, 0, 20], [0, 0.02, 20]]))
    assert 0 < picture.max() <= 100.01


def test_a_parsed_mask_keeps_background_and_clothes_and_replaces_skin_and_hair() -> None:
    labels = np.zeros((512, 512), np.uint8)
    labels[100:400, 100:400] = 1
    labels[60:100, 100:400] = 13
    labels[400:500, 100:400] = 18
    mask = parsed_mask(labels)
    assert mask[250, 250] == 1
    assert mask[85, 250] > 0.5
    assert mask[450, 250] < 0.02
    assert mask[5, 5] == 0
    picture = np.zeros((512, 512, 3), np.float32)
    paste_face(picture, np.full((512, 512, 3), 100, np.float32), np.eye(2, 3), shape="square", parsed=mask)
    assert picture[460, 250].max() < 2
    assert picture[250, 250].min() > 99


def test_a_box_is_drawn_around_the_square() -> None:
    picture = np.zeros((200, 200, 3), np.float32)
    face = np.zeros((100, 100, 3), np.float32)
    paste_face(picture, face, np.array([[1.0, 0, 50], [0, 1.0, 50]]), box_colour=(0, 255, 0))
    assert picture[50, 50:150, 1].min() == 255
    assert picture[100, 100].max() == 0
    assert picture[..., [0, 2]].max() == 0


def test_the_oval_is_one_in_the_middle_and_zero_at_the_border() -> None:
    mask = oval(512)
    assert mask[240:380, 200:320].min() == 1  # eyes to mouth
    assert mask[[0, -1]].max() == mask[:, [0, -1]].max() == 0


def test_grey_and_tinted_pictures_are_grey() -> None:
    luminance = noise(40, 50, 1).repeat(3, axis=2).astype(np.float32)
    assert is_grey(luminance)
    assert is_grey(luminance + np.float32([20, 0, -20]))
    assert not is_grey(noise(40, 50, 3))


def test_a_face_of_a_grey_picture_becomes_grey_with_its_mean_and_spread_and_never_overflows() -> None:
    aligned = np.where(np.indices((64, 64)).sum(0) % 2, 255, 0).astype(np.float32)[..., None].repeat(3, axis=2)
    restored = noise(64, 64, 3).astype(np.float32)
    matched = match_grey(restored, aligned)
    assert (matched == matched[..., :1]).all()
    assert 0 <= matched.min()
    assert matched.max() <= 255
    soft = aligned / 4 + 90
    assert match_grey(restored, soft).mean() == pytest.approx(soft.mean(), abs=0.1)
