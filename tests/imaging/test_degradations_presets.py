"""Degradations by name, from a good picture to a pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.degradations import (
    DESCRIPTIONS,
    PRESETS,
    BlurConfig,
    ClassicalConfig,
    NoiseConfig,
    PassConfig,
    SecondOrderConfig,
    degrade,
    find_preset,
    make_pair,
)
from stablesr_kit.imaging.degradations.classical import degrade_classical
from stablesr_kit.imaging.degradations.filtering import (
    filter2d,
    gaussian_kernel,
    resize,
    usm_sharpen,
)
from stablesr_kit.imaging.degradations.jpeg import jpeg
from tests.helpers.degradation_pictures import photo_like, seeded


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_returns_a_finite_image_of_the_same_size_from_its_generator_alone(name: str) -> None:
    hq = photo_like(2, 100, 76) * 2 - 1
    original, global_state = hq.clone(), torch.get_rng_state()
    lq = degrade(hq, PRESETS[name], seeded(3))
    assert lq.shape == hq.shape and lq.dtype == hq.dtype
    assert lq.isfinite().all() and lq.abs().max() <= 1
    assert torch.equal(lq, degrade(hq, PRESETS[name], seeded(3)))
    assert torch.equal(hq, original) and torch.equal(global_state, torch.get_rng_state())
    if name not in ("bicubic", "area"):
        assert not torch.equal(lq, degrade(hq, PRESETS[name], seeded(4)))


@pytest.mark.parametrize("name", ["stablesr-512", "codeformer-colorization", "light"])
def test_with_a_generator_per_picture_the_batch_does_not_matter(name: str) -> None:
    hq, config = photo_like(3) * 2 - 1, PRESETS[name]
    together = degrade(hq, config, [seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(together[i : i + 1], degrade(hq[i : i + 1], config, seeded(i)))


def test_the_one_pass_model_is_its_formula() -> None:
    config = ClassicalConfig(
        kernel_size=13,
        blur_sigma=(2.0, 2.0),
        isotropic_probability=1.0,
        downsample=(4.0, 4.0),
        noise_sigma=(0.0, 0.0),
        jpeg_quality=(70.0, 70.0),
        up_mode="bicubic",
    )
    image = photo_like(2)
    blurred = filter2d(image, gaussian_kernel(13, 2.0, 2.0))
    small = jpeg(F.interpolate(blurred, (24, 28), mode="bilinear").clamp(0, 1), 70.0)
    expected = F.interpolate(small, (96, 112), mode="bicubic").clamp(0, 1)
    assert (degrade_classical(image, config, seeded())[0] - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_the_bicubic_preset_is_pillows_reduction_enlarged() -> None:
    pixels = (photo_like(1, 64, 96)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    small = np.array(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC))
    expected = resize(torch.from_numpy(small).permute(2, 0, 1)[None].float(), (64, 96), "bicubic").clamp(0, 255)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    ours = (degrade(image, find_preset("bicubic"), seeded()) + 1) * 127.5
    assert (ours - expected).abs().max() <= 2 and (ours - expected).abs().mean() < 0.5


def test_clean_sharpened_and_grey_targets() -> None:
    hq = photo_like(2) * 2 - 1
    clean = make_pair(hq, replace(find_preset("stablesr-768v"), clean_probability=1.0), seeded())
    assert torch.equal(clean.lq, clean.hq) and torch.allclose(clean.hq, hq, atol=1e-6)
    sharp = make_pair(hq, find_preset("stablesr-512"), seeded()).hq
    assert torch.allclose(sharp, usm_sharpen((hq + 1) / 2) * 2 - 1, atol=1e-6) and not torch.allclose(sharp, hq)
    grey = make_pair(hq, replace(find_preset("stablesr-face"), grey_probability=1.0), seeded())
    for picture in grey:
        assert torch.equal(picture[:, 0], picture[:, 2])
    coloured = make_pair(hq, replace(find_preset("codeformer-colorization"), grey_probability=1.0), seeded())
    assert torch.allclose(coloured.hq, hq, atol=1e-6)


def test_a_batch_is_left_clean_as_often_as_configured() -> None:
    hq = photo_like(1, 24, 24) * 2 - 1
    config, generator = replace(find_preset("area"), clean_probability=0.3), seeded()
    clean = sum(torch.equal(pair.lq, pair.hq) for pair in (make_pair(hq, config, generator) for _ in range(500)))
    assert clean / 500 == pytest.approx(0.3, abs=0.07)


def test_a_half_precision_picture_stays_one() -> None:
    hq = (photo_like() * 2 - 1).to(torch.bfloat16)
    assert degrade(hq, find_preset("stablesr-512"), seeded()).dtype == torch.bfloat16


def test_the_smallest_picture_named_by_the_error_can_be_degraded_and_a_smaller_one_not() -> None:
    config = find_preset("stablesr-768v")
    with pytest.raises(ImageError, match="at least 44 px"):
        degrade(torch.zeros(1, 3, 43, 64), config, seeded())
    for seed in range(20):
        degrade(torch.zeros(1, 3, 44, 44), config, seeded(seed))
    with pytest.raises(ImageError, match="at least 21 px"):
        degrade(torch.zeros(1, 3, 20, 64), find_preset("codeformer"), seeded())


def test_an_unknown_preset_proposes_the_nearest() -> None:
    assert find_preset("stablesr-face") is PRESETS["stablesr-face"]
    with pytest.raises(ConfigError, match="did you mean 'stablesr-768v'"):
        find_preset("StableSR_768")
    with pytest.raises(ConfigError, match="known: stablesr-512"):
        find_preset("xyz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurConfig(size=(7, 20)), "both odd"),
        (lambda: BlurConfig(sigma=(2.0, 1.0)), "sigma"),
        (lambda: BlurConfig(sinc_probability=1.5), "no probability"),
        (lambda: BlurConfig(gaussian_iso=-1.0), "weights"),
        (lambda: NoiseConfig(gaussian_sigma=(-1.0, 5.0)), "gaussian_sigma"),
        (lambda: SecondOrderConfig(scale=0), "scale=0"),
        (lambda: SecondOrderConfig(last_jpeg_quality=(0.0, 50.0)), "last_jpeg_quality"),
        (lambda: replace(SecondOrderConfig().first, up_probability=0.6), "up_probability"),
        (lambda: replace(SecondOrderConfig().first, resize_range=(1.2, 1.5)), "resize_range"),
        (lambda: ClassicalConfig(kernel_size=40), "kernel_size"),
        (lambda: ClassicalConfig(down_modes=()), "down_modes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_768_model_differs_from_the_512_model_in_three_settings() -> None:
    assert find_preset("stablesr-768v") == replace(
        SecondOrderConfig(), last_jpeg_quality=(60.0, 95.0), clean_probability=0.0, sharpen_target=False
    )
    assert isinstance(SecondOrderConfig().second, PassConfig)


def test_every_preset_is_described_in_one_line() -> None:
    assert list(DESCRIPTIONS) == list(PRESETS)
    assert not any("\n" in description or len(description) > 100 for description in DESCRIPTIONS.values())


def test_the_classical_preset_spans_the_strengths_of_the_face_models() -> None:
    classical = find_preset("classical")
    assert isinstance(classical, ClassicalConfig)
    for name in ("codeformer", "codeformer-small", "stablesr-face"):
        other = find_preset(name)
        assert isinstance(other, ClassicalConfig)
        for span in ("blur_sigma", "downsample", "noise_sigma", "jpeg_quality"):
            assert getattr(classical, span)[0] <= getattr(other, span)[0]
            assert getattr(classical, span)[1] >= getattr(other, span)[1]
