"""All that is measured of a restored picture at once."""

import math
from pathlib import Path

from stablesr_kit.evaluation.metrics import BORDER_PX, PristineStatistics, niqe, psnr, ssim
from stablesr_kit.evaluation.resampling import Pixels


class Quality:
    """The metrics of a picture by name: psnr and ssim where the truth is known, niqe where its statistics are.

    niqe_statistics: the .npz file of NIQE's published implementation, or None. Raises ConfigError for another file.
    """

    def __init__(self, niqe_statistics: str | None = None) -> None:
        self.pristine = None if niqe_statistics is None else PristineStatistics.load(Path(niqe_statistics))

    def __call__(self, restored: Pixels, truth: Pixels | None) -> dict[str, float]:
        """Metrics of a picture (H, W, 3) against a truth of its size, without a border of 4 px; only finite ones."""
        metrics = {}
        if truth is not None:
            metrics = {"psnr": psnr(restored, truth, BORDER_PX), "ssim": ssim(restored, truth, BORDER_PX)}
        if self.pristine is not None:
            metrics["niqe"] = niqe(restored, self.pristine, BORDER_PX)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
