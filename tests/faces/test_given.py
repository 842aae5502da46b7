"""Faces given by hand, detectors by name, and the parser: what is read, and what is refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from stablesr_kit.errors import CheckpointError, ConfigError, ImageError, StableSRKitError
from stablesr_kit.faces.detectors import MTCNNDetector, place_given_faces, read_given_faces
from stablesr_kit.faces.face import Box
from stablesr_kit.pipelines.face_parts import load_detector, load_parser


def test_boxes_and_landmarks_are_read_by_photo(tmp_path: Path) -> None:
    path = tmp_path / "faces.json"
    path.write_text('{"a.jpg": [{"box": [1, 2, 30, 40]}, {"landmarks": [[1, 1], [9, 1], [5, 9]]}], "b.jpg": []}')
    faces = read_given_faces(path)
    assert faces["a.jpg"][0] == Box(1, 2, 30, 40)
    assert np.array_equal(faces["a.jpg"][1], [[1, 1], [9, 1], [5, 9]])
    assert faces["b.jpg"] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"a.jpg": {}}',
        '{"a.jpg": [{"box": [1, 2, 3]}]}',
        '{"a.jpg": [{"box": [9, 9, 1, 1]}]}',
        '{"a.jpg": [{"box": [0, 0, 1e999, 1]}]}',
        '{"a.jpg": [{"landmarks": [[1, 2]]}]}',
        '{"a.jpg": [{"landmarks": [["x", 2], [1, 2], [1, 2]]}]}',
        '{"a.jpg": [{}]}',
        '{"a.jpg": [7]}',
        pytest.param("[" * 100_000, id="brackets without end"),
        pytest.param('{"a.jpg": [{"box": [0, 0, 1' + "0" * 400 + ", 1]}]}", id="more than a float holds"),
        pytest.param('{"a.jpg": [{"landmarks": [[9, 1], [1, 1], [5, 9]]}]}', id="left and right exchanged"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "faces.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"expected \{") as raised:
        read_given_faces(path)
    assert "\n" not in str(raised.value)


def test_a_box_gets_landmarks_of_the_detector_or_of_an_upright_face() -> None:
    pixels = np.ascontiguousarray(data.astronaut()[20:276, 120:376])
    seen, empty = place_given_faces(pixels, [Box(58, 50, 150, 165), Box(0, 0, 40, 50)], MTCNNDetector())
    assert (seen.landmarks_from, empty.landmarks_from) == ("detector", "template")
    assert np.abs(seen.landmarks[0] - (83.5, 80.5)).max() < 5
    assert (empty.landmarks.min(0) > 0).all()
    assert (empty.landmarks.max(0) < (40, 50)).all()


@pytest.mark.parametrize("given", [Box(60, 10, 90, 40), np.array([[-50.0, 5], [-40, 5], [-45, 20]])])
def test_a_face_outside_the_picture_is_refused_and_one_across_its_border_is_not(given: Box | np.ndarray) -> None:
    pixels = np.zeros((50, 60, 3), np.uint8)
    with pytest.raises(ImageError, match="outside the picture, 50 pixels high and 60 wide"):
        place_given_faces(pixels, [given], MTCNNDetector())
    (face,) = place_given_faces(pixels, [Box(50, 10, 90, 40)], MTCNNDetector())
    assert face.box == (50, 10, 90, 40)


@pytest.mark.parametrize("given", [Box(-1e300, -1e300, 1e300, 1e300), Box(-200, 0, 200, 10), Box(5, 5, 5.5, 5.1)])
def test_a_face_far_larger_than_its_picture_or_smaller_than_a_pixel_is_refused(given: Box) -> None:
    with pytest.raises(ImageError, match=r"a given face of .* pixels .* expected") as raised:
        place_given_faces(np.zeros((50, 60, 3), np.uint8), [given], MTCNNDetector())
    assert len(str(raised.value)) < 300


def test_detectors_without_their_file_say_which_one_they_need(tmp_path: Path) -> None:
    assert load_detector("mtcnn").name == "mtcnn"
    with pytest.raises(ConfigError, match="mtcnn has its weights in the package"):
        load_detector("mtcnn", tmp_path / "mine.pth")
    with pytest.raises(ConfigError, match=r"face_detection_yunet_2023mar\.onnx"):
        load_detector("yunet")
    with pytest.raises(StableSRKitError, match=r"no such file"):
        load_detector("yunet", tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot read it as YuNet"):
        load_detector("yunet", tmp_path / "broken.onnx")
    with pytest.raises(ConfigError, match="facexlib|weights"):
        load_detector("retinaface")


def test_parsenet_labels_faces_of_any_size_and_refuses_other_weights(tmp_path: Path) -> None:
    parsenet = pytest.importorskip("facexlib.parsing.parsenet", reason="needs the extra faces")
    torch.manual_seed(0)
    network = parsenet.ParseNet(in_size=512, out_size=512, parsing_ch=19).eval()
    torch.save(network.state_dict(), tmp_path / "parsing_parsenet.pth")
    face = np.random.default_rng(0).uniform(0, 255, (1, 512, 512, 3)).astype(np.float32)
    labels = load_parser(tmp_path / "parsing_parsenet.pth").parse(face)
    with torch.no_grad():
        expected = network(torch.from_numpy(face).permute(0, 3, 1, 2) / 127.5 - 1)[0].argmax(1)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected)
    assert load_parser(tmp_path / "parsing_parsenet.pth").parse(face[:, :64, :64]).shape == (1, 512, 512)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no weights of ParseNet") as raised:
        load_parser(tmp_path / "other.pth")
    assert len(str(raised.value)) < 300


@pytest.mark.filterwarnings("error")
def test_retinaface_takes_the_file_of_either_backbone_and_refuses_other_weights(tmp_path: Path) -> None:
    retinaface = pytest.importorskip("facexlib.detection.retinaface", reason="needs the extra faces")
    torch.manual_seed(0)
    path = tmp_path / "detection_mobilenet0.25_Final.pth"
    network = retinaface.RetinaFace(network_name="mobile0.25", device="cpu")
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    detector = load_detector("retinaface", path)
    assert detector.name == "retinaface_mobile0.25"
    assert detector.detect(np.zeros((40, 60, 3), np.uint8)) == []
    with pytest.raises(CheckpointError, match="no weights of retinaface_resnet50") as raised:
        load_detector("retinaface", path.rename(tmp_path / "other.pth"))
    assert len(str(raised.value)) < 300
