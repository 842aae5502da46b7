"""All that is measured of a restored picture at once."""

import math
from collections.abc import Callable
from pathlib import Path

from stablesr_kit.evaluation.metrics import (
    BORDER_PX,
    DISTS,
    LPIPS,
    PristineStatistics,
    Weights,
    grid,
    niqe,
    psnr,
    ssim,
)
from stablesr_kit.evaluation.resampling import Pixels


class Quality:
    """The metrics of a picture by name: grid; psnr and ssim where the truth is known; niqe where its statistics are;
    lpips and dists where there are a truth and their weights.

    niqe_statistics: the .npz file of NIQE's published implementation, or None. metric_weights: folder of the weights of
    LPIPS and DISTS, or None. Raises ConfigError or CheckpointError for other files.
    """

    def __init__(self, niqe_statistics: str | None = None, metric_weights: str | None = None) -> None:
        self.pristine = None if niqe_statistics is None else PristineStatistics.load(Path(niqe_statistics))
        self.distances: dict[str, Callable[[Pixels, Pixels], float]] = {}
        if metric_weights is not None:
            weights = Weights((Path(metric_weights),))
            self.distances = {"lpips": LPIPS(weights, "alex"), "dists": DISTS(weights)}

    def __call__(self, restored: Pixels, truth: Pixels | None) -> dict[str, float]:
        """Metrics of a picture (H, W, 3) against a truth of its size, without a border of 4 px; only finite ones."""
        metrics = {"grid": grid(restored)}
        if truth is not None:
            metrics |= {"psnr": psnr(restored, truth, BORDER_PX), "ssim": ssim(restored, truth, BORDER_PX)}
            metrics |= {name: distance(restored, truth) for name, distance in self.distances.items()}
        if self.pristine is not None:
            metrics["niqe"] = niqe(restored, self.pristine, BORDER_PX)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
