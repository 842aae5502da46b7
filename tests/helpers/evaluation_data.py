"""Pictures and weights for tests of evaluation that are not in the repository: beside it, or where a variable says."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stablesr_kit.evaluation.metrics import Weights

SHARED = Path(os.environ.get("STABLESR_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
EVAL_OPEN = SHARED / "eval_open"
NIQE_STATISTICS = SHARED / "metrics" / "niqe_pris_params.npz"
WEIGHTS = Weights((SHARED / "weights",))

has_eval_open = pytest.mark.skipif(not EVAL_OPEN.is_dir(), reason=f"{EVAL_OPEN} is not there")
has_weights = pytest.mark.skipif(
    WEIGHTS.find("vgg16_fp16.safetensors") is None, reason=f"real weights are not in {SHARED / 'weights'}"
)


def read(file: Path) -> NDArray[np.uint8]:
    """The pixels of a picture."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
