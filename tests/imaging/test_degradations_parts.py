"""Kernels, filters, JPEG, resizing and noise against independent peers and their own statistics."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stablesr_kit.imaging.degradations.draws import add_gaussian_noise, add_poisson_noise
from stablesr_kit.imaging.degradations.filtering import (
    delta_kernel,
    filter2d,
    gaussian_kernel,
    generalised_gaussian_kernel,
    pad_kernel,
    plateau_kernel,
    rescale,
    resize,
    sinc_kernel,
    usm_sharpen,
)
from stablesr_kit.imaging.degradations.jpeg import jpeg
from tests.helpers.degradation_pictures import photo_like, seeded


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
@pytest.mark.parametrize(("height", "width"), [(96, 112), (61, 83), (24, 25), (5, 4)])
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
    # Integer arithmetic rounds some coefficients to the other side: a small part of what the file loses.
    assert torch.stack(errors).mean() < max(0.9, 0.12 * torch.stack(losses).mean())


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
