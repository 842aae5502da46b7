"""Whether a restored face is still the same person: its distance from the input face."""

from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from stablesr_kit.faces.geometry import shown_in
from stablesr_kit.faces.paste import LUMA, oval

# Side of the pictures compared: what a bad photograph still shows of a face, and what restoring must not move.
_COMPARED_PX = 32
_WINDOW_SIGMA_PX = 2.0
# Stabiliser of SSIM's structure term, in squared 8-bit levels.
_C = (0.03 * 255) ** 2


class FaceEmbedder(Protocol):
    """A network of face recognition."""

    def __call__(self, faces: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings (N, D) of aligned faces (N, S, S, 3), RGB in 8-bit levels."""


def identity_distance(
    aligned: NDArray[np.float32], restored: NDArray[np.float32], embedder: FaceEmbedder | None = None
) -> NDArray[np.float64]:
    """Distance (N,) of each restored face from its aligned input; 0 is the same face.

    aligned, restored: (N, S, S, 3), RGB in 8-bit levels. With an embedder, one minus the cosine of the embeddings;
    without, `structural_distance`.
    """
    if embedder is None:
        return np.array([structural_distance(*pair) for pair in zip(aligned, restored, strict=True)])
    before, after = embedder(aligned).astype(np.float64), embedder(restored).astype(np.float64)
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return np.asarray(1 - (before * after).sum(axis=1) / np.maximum(lengths, 1e-12))


def structural_distance(aligned: NDArray[np.float32], restored: NDArray[np.float32]) -> float:
    """One minus the structure term of SSIM (Wang et al. 2004), averaged over the face at low resolution; 0 to 2.

    At 32 x 32 pixels noise and blur of the input are gone, but eyes, nose and mouth are there: if they moved, opened or
    closed, the windows around them no longer correlate. Brightness, contrast and colour do not count, and neither does
    what a network paints beyond the border of the picture.
    """
    x, y = (_small(face @ LUMA) for face in (aligned, restored))
    shown = _small(shown_in(aligned))
    y = shown * y + (1 - shown) * x
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    spread_x = np.sqrt((_local_mean(x * x) - mean_x**2).clip(0))
    spread_y = np.sqrt((_local_mean(y * y) - mean_y**2).clip(0))
    structure = (_local_mean(x * y) - mean_x * mean_y + _C / 2) / (spread_x * spread_y + _C / 2)
    weight = shown * oval(_COMPARED_PX)
    return float(1 - (structure * weight).sum() / max(weight.sum(), 1e-12))


def _small(values: NDArray[Any]) -> NDArray[np.float64]:
    size = (_COMPARED_PX, _COMPARED_PX)
    return np.asarray(cv2.resize(values.astype(np.float64), size, interpolation=cv2.INTER_AREA))


def _local_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), _WINDOW_SIGMA_PX))
