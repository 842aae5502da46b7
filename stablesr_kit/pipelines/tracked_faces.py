"""Faces of a clip: found in every frame, followed from frame to frame, and pasted where they are, without jitter."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablesr_kit.faces.face import Box, Face
from stablesr_kit.pipelines.face_refinement import FaceRefinement

GAIN = 0.3
"""Of what a detector says about a face that was seen before; the rest is where the face was expected."""
VELOCITY_GAIN = GAIN**2 / (2 - GAIN)
"""Of the velocity, as Benedict and Bordner (1962) choose it for the same smoothness."""
LEAST_OVERLAP = 0.3
"""Of a found box with the expected one, as intersection over union, for them to be one face."""
MOST_MISSED = 5
"""Frames in a row in which a face that is not found is still restored where it is expected."""


class TrackedFaces(FaceRefinement):
    """`FaceRefinement` for `StableSRVideo`: `video.restore(frames, post_stages=[TrackedFaces(codeformer, w=0.7)])`.

    A detector's landmarks tremble, and with them the square that is pasted. Each face is followed, and its landmarks
    are smoothed by a filter that knows of its velocity (alpha-beta, Kalata 1984), so that it does not lag behind a face
    that moves. Frames are to be given one by one, in order; arguments as of `FaceRefinement`.

    Attributes:
        state: the faces that are followed, as plain values; empty at the beginning of a scene.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state: dict[str, Any] = {}

    def find(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces of the next frame, (H, W, 3), RGB: those found, smoothed, and those that were there just now."""
        found = super().find(pixels)
        tracks = [_expected(track) for track in self.state.get("tracks", [])]
        overlaps = np.array([[_overlap(track["box"], face.box) for face in found] for track in tracks])
        pairs: dict[int, int] = {}
        while overlaps.size and overlaps.max() >= LEAST_OVERLAP:
            number, at = map(int, np.unravel_index(int(overlaps.argmax()), overlaps.shape))
            pairs[number] = at
            overlaps[number], overlaps[:, at] = -1, -1
        followed = [_seen(tracks[number], found[at]) for number, at in pairs.items()]
        lost = [track | {"missed": track["missed"] + 1} for i, track in enumerate(tracks) if i not in pairs]
        kept = [track for track in lost if track["missed"] <= MOST_MISSED]
        new = [_begun(face) for at, face in enumerate(found) if at not in pairs.values()]
        self.state = {"tracks": [*followed, *kept, *new]}
        return [_face(track) for track in self.state["tracks"]]


def _begun(face: Face) -> dict[str, Any]:
    return {
        "landmarks": torch.from_numpy(face.landmarks.copy()),
        "velocity": torch.zeros(2, dtype=torch.float64),
        "box": [float(edge) for edge in face.box],
        "score": float(face.score),
        "turned": face.turned,
        "landmarks_from": face.landmarks_from,
        "missed": 0,
    }


def _expected(track: dict[str, Any]) -> dict[str, Any]:
    """Where a face will be in the next frame if it moves on as it did."""
    across, down = track["velocity"].tolist()
    left, top, right, bottom = track["box"]
    box = [left + across, top + down, right + across, bottom + down]
    return track | {"landmarks": track["landmarks"] + track["velocity"], "box": box}


def _seen(track: dict[str, Any], face: Face) -> dict[str, Any]:
    """An expected face, corrected by what was found."""
    error = torch.from_numpy(face.landmarks) - track["landmarks"]
    return _begun(face) | {
        "landmarks": track["landmarks"] + GAIN * error,
        "velocity": track["velocity"] + VELOCITY_GAIN * error.mean(0),
    }


def _face(track: dict[str, Any]) -> Face:
    return Face(
        box=Box(*track["box"]),
        score=track["score"],
        landmarks=track["landmarks"].numpy(),
        turned=track["turned"],
        landmarks_from=track["landmarks_from"],
    )


def _overlap(one: list[float], other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return shared / max(areas - shared, 1e-9)
