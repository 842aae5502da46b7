"""Grey is what looks grey: noise of scanners and of JPEG does not count, a tint and a small coloured thing do."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.imaging.color_fix import Neutral, is_neutral
from stablesr_kit.spaces import pixels_to_image

PHOTO = np.asarray(Image.fromarray(data.camera()).resize((160, 128)))
COLOUR = np.asarray(Image.fromarray(data.astronaut()).resize((160, 128)))
SCAN_NOISE = np.random.default_rng(0).normal(0, 5, (128, 160, 3))


def view(pixels: np.ndarray) -> View:
    return View(pixels_to_image(pixels.round().clip(0, 255).astype(np.uint8)))


def through(pixels: np.ndarray, name: str, **options: object) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(buffer, name, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


GREY = PHOTO[..., None].repeat(3, axis=2).astype(float)
RED_THING = GREY.copy()
RED_THING[40:50, 60:70] = (180, 30, 40)


@pytest.mark.parametrize(
    "pixels",
    [
        GREY,
        through(GREY, "JPEG", quality=30),
        through(GREY, "JPEG", quality=90, subsampling=0),
        through(GREY, "GIF"),
        GREY + SCAN_NOISE,
        through(GREY + SCAN_NOISE, "JPEG", quality=60),
        through(GREY + SCAN_NOISE, "JPEG", quality=95, subsampling=0),
        through(GREY + SCAN_NOISE, "WEBP", quality=70),
        GREY[:5, :7],
        np.full((300, 20, 3), 255.0),
    ],
    ids=["exact", "jpeg30", "jpeg90", "gif", "noise", "noise jpeg60", "noise jpeg95", "noise webp", "tiny", "white"],
)
def test_black_and_white_in_any_container_is_neutral(pixels: np.ndarray) -> None:
    assert is_neutral(view(pixels))


@pytest.mark.parametrize(
    "pixels",
    [
        COLOUR,
        through(COLOUR, "JPEG", quality=20),
        GREY * (1.02, 1.0, 0.97),
        through(GREY * (1.02, 1.0, 0.97), "JPEG", quality=75),
        through(GREY * (1.05, 1.0, 0.9) + SCAN_NOISE, "JPEG", quality=60),
        RED_THING,
        through(RED_THING, "JPEG", quality=60),
        COLOUR * 0.1 + GREY * 0.9,
    ],
    ids=["colour", "jpeg20", "tint", "tint jpeg", "sepia", "red thing", "red thing jpeg", "pale"],
)
def test_a_tint_and_a_coloured_thing_are_colours(pixels: np.ndarray) -> None:
    assert not is_neutral(view(pixels))


def test_neutral_takes_the_colours_out_and_leaves_grey_as_it_is() -> None:
    image = pixels_to_image(COLOUR)
    neutral = assembled(Neutral(View(image)))
    assert torch.equal(neutral[:, 0], neutral[:, 1])
    assert torch.equal(neutral[:, 0], neutral[:, 2])
    luma = np.asarray(Image.fromarray(COLOUR).convert("L"), dtype=float)
    assert np.abs((neutral[0, 0].numpy() + 1) * 127.5 - luma).max() < 1
    grey = pixels_to_image(GREY.astype(np.uint8))
    assert torch.allclose(assembled(Neutral(View(grey))), grey, atol=1e-6)
