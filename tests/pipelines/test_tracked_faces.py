"""Faces of a clip: followed without trembling and without lag, kept while a detector misses them, forgotten at cuts."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablesr_kit import FaceRefinement
from stablesr_kit.faces.face import Box, Face
from stablesr_kit.pipelines.tracked_faces import MOST_MISSED, TrackedFaces
from stablesr_kit.pipelines.video import ClipState, Remembering, StableSRVideo, Steadiness
from stablesr_kit.spaces import image_to_pixels, image_to_unit
from tests.faces.test_refinement import Smoothing, photo
from tests.helpers.tiny import tiny_pipeline, unit_noise

POINTS = np.array([[30.0, 40], [50, 40], [40, 52], [33, 62], [47, 62]])
PIXELS = np.zeros((128, 128, 3), np.uint8)


class Script:
    """A detector that finds what it is told for one picture after the other."""

    name = "script"

    def __init__(self, frames: list[list[Face]]) -> None:
        self.calls = iter([call for faces in frames for call in ([faces] if faces else [[]] * 4)])  # turned thrice

    def detect(self, _: np.ndarray) -> list[Face]:
        return next(self.calls)


def face(right: float = 0.0, down: float = 0.0, noise: np.ndarray | float = 0.0) -> Face:
    box = Box(25 + right, 25 + down, 55 + right, 70 + down)
    return Face(box=box, score=0.99, landmarks=POINTS + (right, down) + noise)


def followed(frames: list[list[Face]]) -> list[list[Face]]:
    stage = TrackedFaces(Smoothing(), 0.5, detector=Script(frames))
    return [stage.find(PIXELS) for _ in frames]


def test_a_face_that_stands_still_does_not_tremble() -> None:
    noise = np.random.default_rng(0).normal(0, 1, (60, 5, 2))
    landmarks = np.stack([one.landmarks for (one,) in followed([[face(noise=step)] for step in noise])])[20:]
    assert landmarks.std(0).mean() < 0.5
    assert np.diff(landmarks, axis=0).std() < 0.35 * np.diff(noise, axis=0).std()
    assert np.abs(landmarks.mean(0) - POINTS).max() < 0.4


def test_a_face_that_moves_is_not_lagged_behind() -> None:
    found = followed([[face(3.0 * i, 1.0 * i)] for i in range(40)])
    assert np.abs(found[-1][0].landmarks - face(117, 39).landmarks).max() < 0.3


def test_a_face_that_is_missed_stays_where_it_is_expected_and_goes_in_the_end() -> None:
    frames = [[face(1.0 * i)] for i in range(30)] + [[] for _ in range(MOST_MISSED + 2)]
    found = followed(frames)
    assert [len(faces) for faces in found[30:]] == [1] * MOST_MISSED + [0, 0]
    assert np.abs(found[32][0].landmarks - face(32).landmarks).max() < 0.5


def test_every_face_keeps_its_own_track() -> None:
    frames = [[face(2.0 * i), face(60 - 0.0 * i)] if i % 2 else [face(60), face(2.0 * i)] for i in range(8)]
    for i, faces in enumerate(followed(frames)):
        places = sorted(one.landmarks[0, 0] for one in faces)
        assert len(faces) == 2 and abs(places[0] - 30 - 2 * i) < 4 and abs(places[1] - 90) < 0.1
    stage = TrackedFaces(Smoothing(), 0.5, detector=Script([[face()], [face(4)]]))
    stage.find(PIXELS)
    stage.state = {}  # a cut
    (new,) = stage.find(PIXELS)
    assert np.array_equal(new.landmarks, face(4).landmarks)


def test_a_real_detectors_landmarks_tremble_less() -> None:
    frames = [(photo() + 0.06 * unit_noise(1, 3, 128, 128, seed=i)).clamp(-1, 1) for i in range(10)]
    trembling = []
    for stage in (FaceRefinement(Smoothing(), 0.5), TrackedFaces(Smoothing(), 0.5)):
        places = []
        for frame in frames:
            (one,) = stage.find(image_to_pixels(frame)[0])
            places.append(one.landmarks)
        trembling.append(np.diff(np.stack(places), axis=0)[3:].std())
    assert trembling[1] < 0.5 * trembling[0]


def test_a_clip_with_a_face_goes_on_from_a_saved_state_to_the_bit(tmp_path: Path) -> None:
    frames = [image_to_unit(photo()[:, :, 8:104, 10 + i : 106 + i]) for i in range(3)]
    video = StableSRVideo(tiny_pipeline(with_text=False), Steadiness(bands=0), chunk=1)

    def stage() -> TrackedFaces:
        return TrackedFaces(Smoothing(), 0.2, max_enlargement=99, max_identity_distance=None)

    assert isinstance(stage(), Remembering) and not isinstance(FaceRefinement(Smoothing(), 0.2), Remembering)
    chunks = list(video.chunks(frames, scale=1, post_stages=[stage()]))
    plain = list(video.restore(frames, scale=1))
    changed = [(chunk.frames[0].image != one).any(0) for chunk, one in zip(chunks, plain, strict=True)]
    assert all(0.1 < float(where.float().mean()) < 0.8 for where in changed)
    assert chunks[1].state.stages[0]["tracks"][0]["velocity"][0] < 0
    chunks[1].state.save(tmp_path / "state.pt")
    state = ClipState.load(tmp_path / "state.pt")
    rest: Tensor = next(video.restore(frames[2:], state=state, scale=1, post_stages=[stage()]))
    assert torch.equal(rest, chunks[2].frames[0].image)
