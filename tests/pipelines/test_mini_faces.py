"""The face model of the package: small enough, and of use on a face that it was not trained on."""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from skimage import data

from stablesr_kit import CodeFormerPipeline, FaceRefinement
from stablesr_kit.evaluation.metrics import psnr
from stablesr_kit.imaging.degradations import degrade, find_preset
from stablesr_kit.pipelines.loading import EMBEDDED_FACES, resolve_model
from stablesr_kit.spaces import image_to_pixels, pixels_to_image
from tests.helpers.tiny import seeded


@cache
def model() -> CodeFormerPipeline:
    return CodeFormerPipeline.from_pretrained("mini")


@cache
def face() -> NDArray[np.uint8]:
    """An aligned portrait (256, 256, 3)."""
    (found,) = FaceRefinement(model(), max_identity_distance=None).restore_crops(
        data.astronaut().astype(np.float32), FaceRefinement(model()).find(data.astronaut())
    )
    return found.aligned.round().clip(0, 255).astype(np.uint8)


def test_the_face_model_is_small_enough_to_travel_in_the_package() -> None:
    folder = resolve_model("mini", embedded=EMBEDDED_FACES)
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 24e6


def test_damaged_faces_come_closer_to_the_truth_and_fidelity_to_what_was_given_rises_with_w() -> None:
    preset, truth = find_preset("codeformer-256"), face()
    fidelity, gain = [], []
    for seed in range(6):
        lq = degrade(pixels_to_image(truth), preset, seeded(seed))
        given, *restored = (image_to_pixels(image)[0] for image in (lq, *(model().restore(lq, w) for w in (0, 0.5, 1))))
        fidelity.append([psnr(pixels, given, 0) for pixels in restored])
        gain.append([psnr(pixels, truth, 0) - psnr(given, truth, 0) for pixels in restored])
    means = np.mean(fidelity, axis=0)
    assert means[0] < means[1] < means[2]
    assert np.mean(gain, axis=0)[2] > 0.5
