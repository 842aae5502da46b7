"""MTCNN against the networks written out in numpy, and on photographs of a face; suppression of duplicates."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from stablesr_kit.faces.detectors import MTCNNDetector, MTCNNOptions
from stablesr_kit.faces.face import Box, Face, suppress

Array = NDArray[np.float64]

# Eyes, nose and corners of the mouth of scikit-image's astronaut, read off by eye.
ASTRONAUT = np.array([(83.5, 80.5), (126.5, 83), (106, 106), (82.5, 120), (124, 121.5)])


@cache
def astronaut() -> NDArray[np.uint8]:
    return np.ascontiguousarray(data.astronaut()[20:276, 120:376])


def found(pixels: NDArray[np.uint8]) -> list[Face]:
    return MTCNNDetector().detect(pixels)


def resized(pixels: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=None))


# The networks by their formulas (Zhang et al. 2016), in numpy; (C, H, W) in, channels first.


def conv(x: Array, weight: Array, bias: Array) -> Array:
    windows = sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


def prelu(x: Array, slope: Array) -> Array:
    slope = slope.reshape(-1, *[1] * (x.ndim - 1))
    return np.where(x > 0, x, slope * x)


def pool(x: Array, size: int) -> Array:
    """Maximum in steps of 2; windows that stick out are cut off at the edge."""
    rows, columns = (-(-(side - size) // 2) + 1 for side in x.shape[1:])
    cells = [
        [x[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size].max((1, 2)) for j in range(columns)] for i in range(rows)
    ]
    return np.moveaxis(np.array(cells), 2, 0)


def softmax_of_face(logits: Array) -> Array:
    e = np.exp(logits - logits.max(0))
    return e[1] / e.sum(0)


def written_out(network: torch.nn.Module, x: Array, pools: list[int | None]) -> list[Array]:
    """Scores and regressions of a network whose convolutions are followed by pools of these sizes."""
    w = {name: value.double().numpy() for name, value in network.state_dict().items()}
    for i, size in enumerate(pools, start=1):
        x = prelu(conv(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"]), w[f"prelu{i}.weight"])
        x = pool(x, size) if size else x
    if "dense.weight" in w:
        last = f"prelu{len(pools) + 1}.weight"
        x = prelu(w["dense.weight"] @ x.reshape(-1) + w["dense.bias"], w[last])
        linear: Callable[[str], Array] = lambda name: w[f"{name}.weight"] @ x + w[f"{name}.bias"]  # noqa: E731
    else:
        linear = lambda name: conv(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    heads = [name for name in ("offsets", "landmarks") if f"{name}.weight" in w]
    return [softmax_of_face(linear("score")), *(linear(head) for head in heads)]


@pytest.mark.parametrize(
    ("name", "shape", "pools"),
    [
        ("proposal", (31, 24), [2, None, None]),
        ("refinement", (24, 24), [3, 3, None]),
        ("output", (48, 48), [3, 3, 2, None]),
    ],
)
def test_each_network_computes_its_written_out_formula(
    name: str, shape: tuple[int, int], pools: list[int | None]
) -> None:
    network = getattr(MTCNNDetector(), name)
    x = np.random.default_rng(0).uniform(-1, 1, (3, *shape))
    with torch.no_grad():
        ours = [part[0].double().numpy() for part in network(torch.from_numpy(x[None]).float())]
    if name == "output":
        ours[2] = ours[2].T.reshape(-1)  # all x, then all y
    for one, reference in zip(ours, written_out(network, x, pools), strict=True):
        np.testing.assert_allclose(one, reference, atol=1e-5)


def test_the_weights_are_those_of_the_distribution() -> None:
    detector = MTCNNDetector()
    networks = (detector.proposal, detector.refinement, detector.output)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [6632, 100178, 389040]


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0])
def test_a_face_is_found_once_at_any_size_with_landmarks_where_they_are(factor: float) -> None:
    (face,) = found(resized(astronaut(), factor))
    error = np.linalg.norm(face.landmarks / factor - ASTRONAUT, axis=1)
    assert error.max() < 5, error  # pixels, where the eyes are 43 apart
    assert face.score > 0.99


def test_a_face_of_20_pixels_is_found() -> None:
    small = resized(astronaut(), 20 / 90)
    (face,) = found(small)
    assert 15 < face.box.x2 - face.box.x1 < 28


def test_mirrored_pictures_give_mirrored_landmarks() -> None:
    (face,) = found(astronaut())
    (mirrored,) = found(np.ascontiguousarray(astronaut()[:, ::-1]))
    expected = face.landmarks[[1, 0, 2, 4, 3]]
    expected[:, 0] = astronaut().shape[1] - 1 - expected[:, 0]
    assert np.abs(expected - mirrored.landmarks).max() < 2.5


def test_a_face_cut_by_the_border_is_found() -> None:
    (face,) = found(np.ascontiguousarray(astronaut()[45:]))
    assert face.box.y1 < 5


def test_detection_repeats_itself_bit_by_bit() -> None:
    first, second = found(astronaut()), found(astronaut())
    assert [face.box for face in first] == [face.box for face in second]
    assert all((a.landmarks == b.landmarks).all() for a, b in zip(first, second, strict=True))


def test_strips_do_not_change_what_is_found() -> None:
    whole = MTCNNDetector(MTCNNOptions(strip_px=10_000)).detect(astronaut())
    strips = MTCNNDetector(MTCNNOptions(strip_px=64)).detect(astronaut())
    assert len(whole) == len(strips) == 1
    np.testing.assert_allclose(whole[0].landmarks, strips[0].landmarks, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (11, 40), (12, 12), (300, 13)])
def test_pictures_too_small_for_a_face_have_none(shape: tuple[int, int]) -> None:
    assert found(np.full((*shape, 3), 128, np.uint8)) == []


def test_pictures_without_faces_have_none() -> None:
    for pixels in (data.coffee(), data.chelsea(), data.rocket()):
        assert found(np.asarray(pixels)) == []


def test_a_box_by_hand_gets_landmarks_of_the_last_network() -> None:
    scores, landmarks = MTCNNDetector().landmarks_in(astronaut(), [Box(58.0, 50.0, 150.0, 165.0)])
    assert scores[0] > 0.9
    assert np.abs(landmarks[0] - ASTRONAUT).max() < 5


def test_of_overlapping_boxes_the_surest_stays() -> None:
    boxes = np.array([(0, 0, 10, 10), (1, 0, 11, 10), (30, 30, 40, 40), (2, 2, 5, 5)], np.float64)
    scores = np.array([0.8, 0.9, 0.7, 0.95])
    assert suppress(boxes, scores, 0.5).tolist() == [3, 1, 2]
    assert suppress(boxes, scores, 0.5, relative_to="smaller").tolist() == [3, 2]
    assert suppress(boxes[:0], scores[:0], 0.5).tolist() == []
