"""Picture quality on the luma channel, as the literature measures it. Pictures are uint8 arrays (H, W, 3)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import convolve, correlate1d, uniform_filter
from scipy.special import gamma

Array = NDArray[np.float64]


def luma(pixels: NDArray[np.uint8]) -> Array:
    """Y of BT.601 in its studio range, 16 to 235, not rounded."""
    return pixels.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(restored: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int) -> float:
    """Peak signal-to-noise ratio of the luma in dB, without a border."""
    error = _inside(luma(restored) - luma(truth), border_px)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def ssim(restored: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int) -> float:
    """Structural similarity of the luma (Wang et al. 2004), window 11, deviation 1.5, without a border."""
    x, y = _inside(luma(restored), border_px), _inside(luma(truth), border_px)
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(values: Array) -> Array:
        return _inside(correlate1d(correlate1d(values, taps, axis=0), taps, axis=1), 5)

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def gmsd(restored: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Gradient magnitude similarity deviation of the luma (Xue et al. 2014); 0 is best."""
    prewitt = np.array([[1, 0, -1]] * 3) / 3

    def gradient(pixels: NDArray[np.uint8]) -> Array:
        half = uniform_filter(luma(pixels), 2)[::2, ::2]
        return np.hypot(convolve(half, prewitt), convolve(half, prewitt.T))

    x, y = gradient(restored), gradient(truth)
    return float(np.std((2 * x * y + 170) / (x**2 + y**2 + 170)))


class PristineStatistics(NamedTuple):
    """What NIQE knows of undamaged photographs."""

    mean: Array
    covariance: Array
    window: Array

    @classmethod
    def load(cls, file: Path) -> "PristineStatistics":
        """From the .npz file of the published implementation."""
        data = np.load(file)
        return cls(data["mu_pris_param"].ravel(), data["cov_pris_param"], data["gaussian_window"])


def niqe(pixels: NDArray[np.uint8], pristine: PristineStatistics, border_px: int) -> float:
    """Natural image quality evaluator (Mittal et al. 2013) of the rounded luma; lower is more natural.

    Blocks of 96 px at full and of 48 px at half size; NaN when the picture has fewer than two blocks.
    """
    image = np.round(_inside(luma(pixels), border_px))
    rows, columns = image.shape[0] // 96, image.shape[1] // 96
    if rows * columns < 2:
        return float("nan")
    image = image[: rows * 96, : columns * 96]
    features = []
    for block_px in (96, 48):
        mean = convolve(image, pristine.window, mode="nearest")
        deviation = np.sqrt(np.abs(convolve(image**2, pristine.window, mode="nearest") - mean**2))
        normalised = (image - mean) / (deviation + 1)
        blocks = normalised.reshape(rows, block_px, columns, block_px).swapaxes(1, 2).reshape(-1, block_px, block_px)
        features.append([_block_features(block) for block in blocks])
        half = Image.fromarray(image.astype(np.float32)).resize(
            (image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.BICUBIC
        )
        image = np.asarray(half).astype(np.float64)
    both = np.concatenate(features, axis=1)
    both = both[~np.isnan(both).any(axis=1)]
    difference = both.mean(axis=0) - pristine.mean
    covariance = (np.cov(both, rowvar=False) + pristine.covariance) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(covariance) @ difference))


def _block_features(block: Array) -> list[float]:
    """Shape and spread of the normalised luma, and of its products with four neighbours."""
    alpha, left, right = _fit_asymmetric_gaussian(block)
    features = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        alpha, left, right = _fit_asymmetric_gaussian(block * np.roll(block, shift, axis=(0, 1)))
        features += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
    return features


_ALPHAS = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _ALPHAS) ** 2 / (gamma(1 / _ALPHAS) * gamma(3 / _ALPHAS))


def _fit_asymmetric_gaussian(values: Array) -> tuple[float, float, float]:
    """(shape, left scale, right scale) of an asymmetric generalised Gaussian, by matching moments."""
    left = np.sqrt(np.mean(values[values < 0] ** 2)) if (values < 0).any() else np.nan
    right = np.sqrt(np.mean(values[values > 0] ** 2)) if (values > 0).any() else np.nan
    skew = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    if np.isnan(ratio):
        return float("nan"), float("nan"), float("nan")
    alpha = _ALPHAS[np.argmin((_RATIOS - ratio) ** 2)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return float(alpha), float(left * scale), float(right * scale)


def _inside(values: Array, border_px: int) -> Array:
    return values[border_px : values.shape[0] - border_px, border_px : values.shape[1] - border_px]
