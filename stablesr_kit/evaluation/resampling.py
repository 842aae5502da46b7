"""Making pictures smaller and larger to the bit as the literature of super-resolution does: MATLAB's imresize."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

Pixels = NDArray[np.uint8]
Array = NDArray[np.float64]

SHARPNESS = -0.5
"""Of MATLAB's cubic (Keys 1981, a). Torch and OpenCV take -0.75, and what they make scores otherwise."""


def resize_bicubic_matlab(pixels: Pixels, height: int, width: int) -> Pixels:
    """The picture (h, w, C) at (height, width, C): bicubic, antialiased where it shrinks, edges mirrored.

    To the bit what imresize(picture, [height width], "bicubic") gives for 8-bit pictures, which rounds after the
    columns and again after the rows.
    """
    tall = np.einsum("Hh,hwc->Hwc", _weights(pixels.shape[0], height), pixels.astype(np.float64), optimize=True)
    wide = np.einsum("Ww,Hwc->HWc", _weights(pixels.shape[1], width), _rounded(tall), optimize=True)
    return _rounded(wide).astype(np.uint8)


def reduction_matrices(height: int, width: int, scale: int, blur_sigma: float) -> tuple[Array, Array]:
    """What reduces a picture (H, W) by a Gaussian blur and MATLAB's bicubic: columns (h, H) and rows (w, W).

    The reduced picture is columns @ picture @ rows.T. Borders are mirrored. blur_sigma in px of the large picture.
    """
    columns, rows = (_weights(side, side // scale) @ _blur(side, blur_sigma) for side in (height, width))
    return columns, rows


def reduce_blurred(pixels: Pixels, scale: int, blur_sigma: float) -> Pixels:
    """The picture (H, W, C) blurred and reduced by `reduction_matrices`, (h, w, C): the lecture's (I (x) k) down."""
    columns, rows = reduction_matrices(pixels.shape[0], pixels.shape[1], scale, blur_sigma)
    return _rounded(np.einsum("hH,HWc,wW->hwc", columns, pixels.astype(np.float64), rows, optimize=True)).astype(
        np.uint8
    )


def _blur(side: int, sigma: float) -> Array:
    blurred: Array = gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect") if sigma > 0 else np.eye(side)
    return blurred


def _rounded(values: Array) -> Array:
    return np.floor(np.clip(values, 0, 255) + 0.5)  # halves go up


def _weights(given: int, wanted: int) -> Array:
    """Matrix (wanted, given) that resamples one side."""
    scale = wanted / given
    shrinking = min(scale, 1)
    support = 4 / shrinking
    centre = (np.arange(wanted) + 0.5) / scale - 0.5
    taps = np.floor(centre - support / 2).astype(int)[:, None] + np.arange(math.ceil(support) + 2)
    weights = _cubic(np.abs(centre[:, None] - taps) * shrinking)
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = taps % (2 * given)
    mirrored = np.where(mirrored < given, mirrored, 2 * given - 1 - mirrored)
    matrix = np.zeros((wanted, given))
    np.add.at(matrix, (np.arange(wanted)[:, None], mirrored), weights)
    return matrix


def _cubic(distance: Array) -> Array:
    a = SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
