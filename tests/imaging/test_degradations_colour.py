"""Colour changes and brush strokes of the face degradations."""

import colorsys
import math

import pytest
import torch

from stablesr_kit.imaging.degradations.classical import (
    BRIGHTNESS,
    draw_stroke_mask,
    jitter_colours,
    shift_channels,
    turn_hue,
)
from stablesr_kit.imaging.degradations.draws import to_grey
from tests.helpers.degradation_pictures import photo_like, seeded


def test_turning_the_hue_agrees_with_colorsys() -> None:
    image = photo_like(1, 8, 9)
    turned = turn_hue(image, 0.07)
    for y in range(8):
        for x in range(9):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[0, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((hue + 0.07) % 1, saturation, value)
            assert turned[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(turn_hue(grey, 0.3), grey)
    assert torch.allclose(turn_hue(image, 0.0), image, atol=1e-6)


def test_colour_jitter_keeps_greys_grey_and_spreads_brightness_as_configured() -> None:
    grey = torch.full((1, 3, 4, 4), 0.3)
    generator = seeded()
    means = torch.tensor([jitter_colours(grey, generator).mean().item() for _ in range(800)])
    assert means.min() >= 0.3 * BRIGHTNESS[0] - 1e-3 and means.max() <= 0.3 * BRIGHTNESS[1] + 1e-3
    assert means.mean().item() == pytest.approx(0.3, abs=0.01)
    jittered = jitter_colours(grey, generator)
    assert torch.allclose(jittered[:, 0], jittered[:, 2], atol=1e-6)


def test_channel_shifts_are_constant_and_bounded() -> None:
    image = torch.full((200, 3, 2, 2), 0.5)
    shifts = shift_channels(image, 20 / 255, seeded()) - image
    assert torch.equal(shifts.amax((2, 3)), shifts.amin((2, 3)))
    assert shifts.abs().max() <= 20 / 255 + 1e-6
    assert shifts.std().item() == pytest.approx(20 / 255 / math.sqrt(3), rel=0.1)


def test_stroke_masks_are_binary_reproducible_and_cover_a_fair_part() -> None:
    masks = torch.stack([draw_stroke_mask(128, 160, seeded(seed)) for seed in range(12)])
    assert masks.shape == (12, 1, 128, 160)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(masks[3], draw_stroke_mask(128, 160, seeded(3)))
    large = torch.stack([draw_stroke_mask(512, 512, seeded(seed)) for seed in range(6)])
    assert 0.1 < large.mean().item() < 0.6
    assert large.mean((1, 2, 3)).min() > 0.02


def test_luma_weighs_the_channels_as_bt601() -> None:
    image = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    assert to_grey(image).item() == pytest.approx(0.2989 + 0.587 / 2 + 0.114 / 4, abs=1e-6)
