"""Degradations: reference tensors, independent peers, and the statistics of everything that is drawn."""

import colorsys
import io
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.imaging.degradations import (
    PRESETS,
    BlurConfig,
    ClassicalConfig,
    NoiseConfig,
    PassConfig,
    SecondOrderConfig,
    degrade,
    find_preset,
    make_pair,
    second_order,
)
from stablesr_kit.imaging.degradations.classical import degrade_classical
from stablesr_kit.imaging.degradations.colour import BRIGHTNESS, jitter_colours, shift_channels, turn_hue
from stablesr_kit.imaging.degradations.draws import odd_size, pick, uniform, uniform_each
from stablesr_kit.imaging.degradations.filtering import filter2d, usm_sharpen
from stablesr_kit.imaging.degradations.jpeg import jpeg
from stablesr_kit.imaging.degradations.kernels import (
    delta_kernel,
    gaussian_kernel,
    generalised_gaussian_kernel,
    pad_kernel,
    plateau_kernel,
    sinc_kernel,
)
from stablesr_kit.imaging.degradations.noise import add_gaussian_noise, add_poisson_noise, to_grey
from stablesr_kit.imaging.degradations.resizing import rescale, resize
from stablesr_kit.imaging.degradations.strokes import draw_stroke_mask


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def photo_like(batch: int = 1, height: int = 96, width: int = 112, seed: int = 0) -> Tensor:
    """Smooth colour fields with sharp edges and some grain, (B, 3, H, W) in [0, 1]."""
    generator = seeded(seed)
    fields = F.interpolate(torch.rand(batch, 3, 6, 7, generator=generator), (height, width), mode="bicubic")
    edges = F.interpolate(torch.rand(batch, 1, 5, 5, generator=generator), (height, width), mode="nearest")
    grain = torch.randn(batch, 3, height, width, generator=generator)
    return (0.7 * fields + 0.25 * edges + 0.01 * grain).clamp(0, 1)


@pytest.mark.parametrize("folder", ["tests/goldens/stablesr", "../shared/goldens/stablesr/open"])
def test_agrees_with_the_reference(folder: str) -> None:
    from tests.parity_stablesr_degradation import check_degradation

    root = Path(__file__).parents[1] / folder
    if not (root / "degradation.safetensors").exists():
        pytest.skip(f"{folder} has no degradation.safetensors")
    results = list(check_degradation(root))
    assert len(results) >= 10
    for name, difference, tolerance in results:
        assert difference <= tolerance, name


@pytest.mark.parametrize(
    "kernel",
    [
        gaussian_kernel(21, 1.3, 0.4, 0.7),
        generalised_gaussian_kernel(15, 1.0, 1.0, beta=0.6),
        generalised_gaussian_kernel(15, 1.5, 0.6, -2.0, beta=1.7),
        plateau_kernel(9, 1.2, 0.5, 1.0, beta=1.4),
        sinc_kernel(21, math.pi / 3),
        pad_kernel(sinc_kernel(7, 2.0), 21),
        delta_kernel(21),
    ],
)
def test_kernels_sum_to_one_and_are_symmetric_about_their_centre(kernel: Tensor) -> None:
    assert kernel.dtype == torch.float64
    assert kernel.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-15)


def test_an_elongated_gaussian_has_the_covariance_it_was_asked_for() -> None:
    sigma_x, sigma_y, theta = 3.0, 1.2, 0.5
    kernel = gaussian_kernel(41, sigma_x, sigma_y, theta)
    axis = torch.arange(41, dtype=torch.float64) - 20
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    expected = turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T
    assert (kernel * x * x).sum().item() == pytest.approx(expected[0, 0], rel=1e-4)
    assert (kernel * x * y).sum().item() == pytest.approx(expected[0, 1], rel=1e-4)
    assert (kernel * y * y).sum().item() == pytest.approx(expected[1, 1], rel=1e-4)


def test_generalised_gaussian_with_beta_one_is_a_gaussian() -> None:
    ours = generalised_gaussian_kernel(13, 1.1, 0.7, 0.3, beta=1.0)
    assert torch.allclose(ours, gaussian_kernel(13, 1.1, 0.7, 0.3))


def test_sinc_passes_frequencies_below_its_cutoff_and_stops_those_above() -> None:
    cutoff = math.pi / 2
    response = torch.fft.fft2(sinc_kernel(101, cutoff), s=(256, 256)).abs()
    frequency = torch.fft.fftfreq(256, dtype=torch.float64) * 2 * math.pi
    radius = torch.hypot(frequency[:, None], frequency)
    assert (response[radius < cutoff - 0.3] - 1).abs().max() < 0.05
    assert response[radius > cutoff + 0.3].max() < 0.05


def test_filter2d_equals_direct_correlation_with_mirrored_borders() -> None:
    image, kernels = photo_like(3, 37, 50), torch.rand(3, 9, 9, generator=seeded(1)) / 81
    padded = F.pad(image, (4, 4, 4, 4), mode="reflect")
    expected = torch.stack([F.conv2d(padded[i, :, None], kernels[i, None, None])[:, 0] for i in range(3)])
    assert torch.allclose(filter2d(image, kernels), expected, atol=1e-6)
    assert torch.allclose(filter2d(image, kernels[0])[:1], expected[:1], atol=1e-6)


def test_what_has_no_randomness_does_not_depend_on_the_batch() -> None:
    image, kernels = photo_like(3), torch.stack([gaussian_kernel(13, s, s) for s in (0.5, 1.0, 2.0)])
    quality = torch.tensor([30.0, 60.0, 90.0])
    for i in range(3):
        own = slice(i, i + 1)
        assert torch.allclose(filter2d(image, kernels)[own], filter2d(image[own], kernels[own]), atol=1e-6)
        assert torch.allclose(jpeg(image, quality)[own], jpeg(image[own], quality[i].item()), atol=1e-6)
        assert torch.allclose(usm_sharpen(image)[own], usm_sharpen(image[own]), atol=1e-5)


def test_sharpening_steepens_edges_and_leaves_flat_and_faint_parts_alone() -> None:
    edge = torch.full((1, 3, 64, 64), 0.3)
    edge[..., 32:] = 0.7
    sharp = usm_sharpen(edge)
    assert sharp[0, 0, 32, 32] > 0.75 and sharp[0, 0, 32, 31] < 0.25
    faint = 0.5 + 0.01 * (edge - 0.5)
    assert torch.allclose(usm_sharpen(faint), faint, atol=1e-6)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95, 100])
@pytest.mark.parametrize(("height", "width"), [(96, 112), (61, 83), (24, 25)])
def test_jpeg_returns_what_a_jpeg_file_returns(quality: int, height: int, width: int) -> None:
    errors, losses = [], []
    for picture in photo_like(6, height, width):
        pixels = (picture.permute(1, 2, 0) * 255).round().byte()
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        expected = torch.from_numpy(np.array(Image.open(file))).float()
        levels = jpeg(pixels.permute(2, 0, 1)[None] / 255, quality)[0].permute(1, 2, 0) * 255
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        errors.append((levels - expected).abs().mean())
        losses.append((pixels - expected).abs().mean())
    # Integer arithmetic rounds some coefficients to the other side: about a level, and little of what the file loses.
    assert torch.stack(errors).mean() < max(1.2, 0.2 * torch.stack(losses).mean())


def test_the_official_jpeg_is_further_from_a_jpeg_file() -> None:
    image = (photo_like() * 255).round() / 255
    file = io.BytesIO()
    Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=60)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    ours, official = jpeg(image, 60)[0], jpeg(image, 60, official_quirks=True)[0]
    assert (official - expected).abs().mean() > 2 * (ours - expected).abs().mean()


def test_lower_jpeg_quality_loses_more() -> None:
    image = photo_like()
    losses = [(jpeg(image, quality) - image).abs().mean().item() for quality in (10, 30, 60, 90)]
    assert losses == sorted(losses, reverse=True)


def test_bicubic_reduction_equals_pillows() -> None:
    plane = photo_like(1, 96, 112)[0, 0]
    expected = np.array(Image.fromarray(plane.numpy()).resize((28, 24), Image.Resampling.BICUBIC))
    assert np.abs(resize(plane[None, None], (24, 28), "bicubic", antialias=True)[0, 0].numpy() - expected).max() < 1e-5


def test_area_reduction_keeps_the_mean() -> None:
    image = photo_like(2, 64, 96)
    assert torch.allclose(resize(image, (16, 24), "area").mean((2, 3)), image.mean((2, 3)), atol=1e-6)
    assert rescale(image, 0.37, "area").shape[-2:] == (int(64 * 0.37), int(96 * 0.37))


def test_gaussian_noise_has_mean_zero_and_the_deviation_asked_for_per_picture() -> None:
    image, sigma = torch.full((2, 3, 200, 200), 0.5), torch.tensor([0.02, 0.06])
    noise = add_gaussian_noise(image, sigma, torch.tensor([False, False]), seeded()) - image
    assert noise.std((1, 2, 3)) == pytest.approx(sigma, rel=0.02)
    assert noise.mean().abs() < 1e-3
    channels = noise.transpose(0, 1).reshape(3, -1)
    assert torch.corrcoef(channels)[0, 1].abs() < 0.02


@pytest.mark.parametrize("add", [add_gaussian_noise, add_poisson_noise])
def test_grey_noise_is_the_same_in_all_channels_of_the_pictures_it_is_asked_for(add) -> None:  # type: ignore[no-untyped-def]
    image = photo_like(2) * 0.4 + 0.3
    noise = add(image, torch.tensor([0.03, 0.03]), torch.tensor([True, False]), seeded()) - image
    assert torch.allclose(noise[0, 0], noise[0, 2], atol=1e-6)
    assert not torch.allclose(noise[1, 0], noise[1, 2], atol=1e-3)


def test_poisson_noise_has_mean_zero_and_variance_proportional_to_brightness() -> None:
    levels = torch.tensor([60.0, 100.0, 160.0, 200.0, 30.0]) / 255  # five levels: eight photons at full brightness
    image = levels.repeat_interleave(120)[None, None, :, None].expand(1, 3, 600, 400)
    scale = 0.2
    noise = add_poisson_noise(image, torch.tensor([scale]), torch.tensor([False]), seeded()) - image
    for level, part in zip(levels[:4], noise.split(120, dim=2), strict=False):
        assert part.mean().item() == pytest.approx(0, abs=1e-3)
        assert part.var().item() == pytest.approx(scale**2 * level.item() / 8, rel=0.03)


def test_poisson_strength_follows_each_pictures_own_number_of_levels() -> None:
    few = torch.full((1, 3, 100, 100), 0.5)
    few[..., :50] = 128 / 255  # 0.5 rounds to the same level: one level, one photon
    scale = torch.tensor([0.1, 0.1])
    many = (torch.arange(256) / 255).repeat(118)[:30000].view(1, 3, 100, 100)
    no = torch.tensor([False, False])
    noise = add_poisson_noise(torch.cat([few, many]), scale, no, seeded()) - torch.cat([few, many])
    assert noise[0].var().item() == pytest.approx(0.1**2 * 0.5, rel=0.05)
    assert noise[1].var().item() < 0.1**2 / 256


def test_numbers_are_uniform_over_their_span() -> None:
    numbers = uniform_each((-2.0, 6.0), 20000, seeded())
    assert numbers.min() >= -2 and numbers.max() < 6
    assert numbers.mean().item() == pytest.approx(2, abs=0.1)
    assert numbers.std().item() == pytest.approx(8 / math.sqrt(12), rel=0.02)
    assert uniform((3.0, 3.0), seeded()) == 3.0


def test_choices_follow_their_weights_and_odd_sizes_are_all_drawn() -> None:
    generator = seeded()
    picks = Counter(pick((0.2, 0.0, 0.7, 0.1), generator) for _ in range(4000))
    assert [picks[i] / 4000 for i in range(4)] == pytest.approx([0.2, 0, 0.7, 0.1], abs=0.025)
    sizes = Counter(odd_size((7, 21), generator) for _ in range(4000))
    assert sorted(sizes) == list(range(7, 22, 2))
    assert all(count / 4000 == pytest.approx(1 / 8, abs=0.025) for count in sizes.values())


def test_blur_kernels_are_drawn_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    betas: dict[str, list[float]] = {"generalised": [], "plateau": []}

    def bell(name: str):  # type: ignore[no-untyped-def]
        def kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float = 1.0) -> Tensor:
            assert size in range(7, 22, 2)
            assert 0.2 <= sigma_x <= 1.5 and 0.2 <= sigma_y <= 1.5 and -math.pi <= theta <= math.pi
            drawn[f"{name} {'iso' if sigma_x == sigma_y and theta == 0 else 'aniso'}"] += 1
            if name in betas:
                betas[name].append(beta)
            return delta_kernel(size)

        return kernel

    def sinc(size: int, cutoff: float) -> Tensor:
        assert math.pi / (3 if size < 13 else 5) <= cutoff <= math.pi
        drawn["sinc"] += 1
        return delta_kernel(size)

    monkeypatch.setattr(second_order, "gaussian_kernel", bell("gaussian"))
    monkeypatch.setattr(second_order, "generalised_gaussian_kernel", bell("generalised"))
    monkeypatch.setattr(second_order, "plateau_kernel", bell("plateau"))
    monkeypatch.setattr(second_order, "sinc_kernel", sinc)
    generator, count = seeded(), 4000
    for _ in range(count):
        assert second_order.draw_blur_kernel(BlurConfig(), generator).shape == (21, 21)
    expected = {
        "sinc": 0.1,
        "gaussian iso": 0.9 * 0.45,
        "gaussian aniso": 0.9 * 0.25,
        "generalised iso": 0.9 * 0.12,
        "generalised aniso": 0.9 * 0.03,
        "plateau iso": 0.9 * 0.12,
        "plateau aniso": 0.9 * 0.03,
    }
    assert {name: drawn[name] / count for name in expected} == pytest.approx(expected, abs=0.025)
    for name, (low, high) in {"generalised": (0.5, 2.0), "plateau": (1.0, 1.5)}.items():
        assert low <= min(betas[name]) and max(betas[name]) <= high
        assert sum(beta <= 1 for beta in betas[name]) / len(betas[name]) == pytest.approx(0.5, abs=0.08)


def test_resizing_follows_its_probabilities_and_range() -> None:
    generator, config = seeded(), SecondOrderConfig().first
    factors = torch.tensor([second_order._resize_factor(config, generator) for _ in range(4000)])
    assert factors.min() >= 0.3 and factors.max() <= 1.5
    shares = [(factors > 1).float().mean(), (factors < 1).float().mean(), (factors == 1).float().mean()]
    assert [share.item() for share in shares] == pytest.approx([0.2, 0.7, 0.1], abs=0.025)


def test_every_stage_of_the_two_pass_model_happens_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def recorded(name: str, change: bool = False):  # type: ignore[no-untyped-def]
        def stage(x: Tensor, *arguments: object, **_: object) -> Tensor:
            events.append(name)
            return F.interpolate(x, arguments[0]) if change else x  # type: ignore[arg-type]

        return stage

    for name in ("jpeg", "filter2d", "rescale", "add_gaussian_noise", "add_poisson_noise"):
        monkeypatch.setattr(second_order, name, recorded(name))
    monkeypatch.setattr(second_order, "resize", recorded("resize", change=True))
    generator, config, count = seeded(), SecondOrderConfig(), 400
    orders: Counter[str] = Counter()
    first_noises: Counter[str] = Counter()
    for _ in range(count):
        events.clear()
        assert second_order.degrade_second_order(torch.zeros(1, 3, 64, 64), config, generator).shape[-1] == 16
        first, second = events[:4], events[4:]
        assert first[:2] == ["filter2d", "rescale"] and first[3] == "jpeg"
        first_noises[first[2]] += 1
        orders[" ".join(event for event in second if "noise" not in event)] += 1
    assert first_noises["add_gaussian_noise"] / count == pytest.approx(0.5, abs=0.08)
    expected = {
        f"{blur}resize {last}": 0.25
        for blur in ("", "filter2d ")
        for last in ("resize filter2d jpeg", "jpeg resize filter2d")
    }
    assert {order: n / count for order, n in orders.items()} == pytest.approx(expected, abs=0.08)


def test_the_final_sinc_is_drawn_four_times_in_five() -> None:
    generator, config = seeded(), SecondOrderConfig()
    plain = sum(torch.equal(second_order._final_kernel(config, generator), delta_kernel(21)) for _ in range(2000))
    assert plain / 2000 == pytest.approx(0.2, abs=0.03)


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
