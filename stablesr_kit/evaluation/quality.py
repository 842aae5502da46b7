"""All that is measured of a restored picture at once."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablesr_kit.errors import ConfigError
from stablesr_kit.evaluation.metrics import PristineStatistics, niqe, psnr, ssim

BORDER_PX = 4
"""What is left out at each side, as the literature does at a scale of 4."""


class Quality:
    """The metrics of a picture by name: psnr and ssim where the truth is known, niqe where its statistics are.

    niqe_statistics: the .npz file of NIQE's published implementation, or None. Raises ConfigError for another file.
    """

    def __init__(self, niqe_statistics: str | None = None) -> None:
        self.pristine = None
        if niqe_statistics is not None:
            try:
                self.pristine = PristineStatistics.load(Path(niqe_statistics))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"niqe_statistics={niqe_statistics} cannot be read ({error}); "
                    "give niqe_pris_params.npz or leave it out"
                ) from error

    def __call__(self, restored: NDArray[np.uint8], truth: NDArray[np.uint8] | None) -> dict[str, float]:
        """Metrics of a picture (H, W, 3) against a truth of its size, without a border of 4 px; only finite ones."""
        metrics = {}
        if truth is not None:
            metrics = {"psnr": psnr(restored, truth, BORDER_PX), "ssim": ssim(restored, truth, BORDER_PX)}
        if self.pristine is not None:
            metrics["niqe"] = niqe(restored, self.pristine, BORDER_PX)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
