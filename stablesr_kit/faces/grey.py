"""Grey and tinted photographs: their faces get no colour of their own."""

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.faces.geometry import shown_in

# RGB, ITU-R BT.601 as rounded by the published script.
LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)


def is_grey(picture: NDArray[np.generic], threshold: float = 10.0) -> bool:
    """Whether the channels of a picture (H, W, 3) in 8-bit levels differ by a constant at most: grey, or one tint."""
    red, green, blue = (picture[..., channel].astype(np.float32) for channel in range(3))
    return bool(np.mean([(red - green).var(), (red - blue).var(), (green - blue).var()]) <= threshold)


def match_grey(face: NDArray[np.float32], aligned: NDArray[np.float32]) -> NDArray[np.float32]:
    """The luminance of a restored face (S, S, 3) with the mean and spread of the aligned input in each channel.

    Both in 8-bit levels; the result is clipped to 0 ... 255. What lies beyond the picture has no tint and is left
    out.
    """
    grey = np.repeat((face @ LUMA)[..., None], 3, axis=2).astype(np.float64)
    shown = shown_in(aligned)
    shown |= not shown.any()
    mean, spread = _statistics(aligned[shown])
    own_mean, own_spread = _statistics(grey[shown])
    return ((grey - own_mean) / own_spread * spread + mean).clip(0, 255).astype(np.float32)


def _statistics(colours: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = colours.astype(np.float64)
    return values.mean(axis=0), np.sqrt(values.var(axis=0) + 1e-5)
