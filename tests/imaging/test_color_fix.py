"""Colour fix: reference tensors, the properties it exists for, and pictures of every size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.canvas import Region, View, assembled
from stablesr_kit.imaging.color_fix import (
    AdainFixed,
    WaveletFixed,
    YCbCrFixed,
    adain_color_fix,
    blur,
    color_fixed,
    flat_share,
    wavelet_color_fix,
    wavelet_decomposition,
    ycbcr_color_fix,
)
from stablesr_kit.imaging.resizing import resize_bicubic

SIZES = [(1, 1), (1, 7), (7, 1), (2, 3), (15, 33), (64, 48)]


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_blur_equals_a_dilated_convolution(height: int, width: int) -> None:
    image = random_image(height, width)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
    for radius in (1, 2, 16):
        padded = F.pad(image, (radius,) * 4, mode="replicate")
        expected = F.conv2d(padded, kernel, groups=3, dilation=radius)
        torch.testing.assert_close(blur(image, radius), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("fix", [wavelet_color_fix, adain_color_fix])
def test_an_image_that_is_its_own_reference_is_unchanged_at_every_size(fix: Any, height: int, width: int) -> None:
    image = random_image(height, width)
    torch.testing.assert_close(fix(image, image), image, atol=1e-6, rtol=1e-6)


def test_wavelet_takes_the_mean_colour_of_the_reference_and_keeps_the_detail_of_the_image() -> None:
    image = random_image(40, 50)
    shifted = image + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(wavelet_color_fix(shifted, image), image, atol=1e-6, rtol=0)
    high, low = wavelet_decomposition(image)
    torch.testing.assert_close(high + low, image)
    assert low.std() < 0.1 * high.std()


def test_adain_takes_mean_and_spread_of_the_reference() -> None:
    image, reference = random_image(30, 20), random_image(30, 20, seed=1) * 0.5 + 0.2
    fixed = adain_color_fix(image, reference)
    torch.testing.assert_close(fixed.mean((-2, -1)), reference.mean((-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(fixed.std((-2, -1)), reference.std((-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_and_returned_in_half(dtype: torch.dtype) -> None:
    image, reference = random_image(20, 20), random_image(20, 20, seed=1)
    for fix in (wavelet_color_fix, adain_color_fix):
        fixed = fix(image.to(dtype), reference.to(dtype))
        assert fixed.dtype == dtype
        torch.testing.assert_close(fixed.float(), fix(image, reference), atol=3e-2, rtol=0)


def test_none_and_unknown_methods() -> None:
    image = View(random_image(4, 4)[:1])
    assert color_fixed(image, image, "none") is image
    with pytest.raises(ImageError, match="'lab' is not known; use 'wavelet'"):
        color_fixed(image, image, "lab")


def test_a_reference_of_another_size_is_refused() -> None:
    with pytest.raises(ImageError, match="resize the reference first"):
        wavelet_color_fix(random_image(8, 8), random_image(4, 4))
    with pytest.raises(ImageError, match="resize the reference first"):
        adain_color_fix(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("kind", [WaveletFixed, AdainFixed])
def test_every_region_is_fixed_as_in_the_whole_picture(kind: type[WaveletFixed] | type[AdainFixed]) -> None:
    image, reference = torch.rand(2, 1, 3, 531, 70, generator=torch.Generator().manual_seed(0))
    fix = wavelet_color_fix if kind is WaveletFixed else adain_color_fix
    at_once, by_regions = fix(image, reference), kind(View(image), View(reference))
    for region in (Region(0, 0, 531, 70), Region(0, 0, 1, 1), Region(250, 3, 262, 70), Region(500, 30, 531, 31)):
        assert torch.equal(by_regions.read(region), region.crop(at_once))


def test_adain_agrees_with_statistics_of_the_whole_picture() -> None:
    image, reference = random_image(531, 40), random_image(531, 40, seed=1) * 0.5 + 0.2
    mean, std = image.mean((-2, -1), keepdim=True), (image.var((-2, -1), keepdim=True) + 1e-5).sqrt()
    wanted = reference.mean((-2, -1), keepdim=True), (reference.var((-2, -1), keepdim=True) + 1e-5).sqrt()
    expected = (image - mean) / std * wanted[1] + wanted[0]
    torch.testing.assert_close(adain_color_fix(image, reference), expected, atol=1e-6, rtol=0)


def test_ycbcr_keeps_the_luma_and_takes_the_chroma_as_another_implementation_does() -> None:
    from skimage.color import rgb2ycbcr, ycbcr2rgb

    image, reference = torch.rand(2, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    mixed, given = (rgb2ycbcr(one[0].double().numpy(), channel_axis=0) for one in (reference, image))
    mixed[0] = given[0]
    expected = torch.from_numpy(ycbcr2rgb(mixed, channel_axis=0))
    assert (ycbcr_color_fix(image, reference)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["wavelet", "adain", "ycbcr"])
def test_what_is_flat_stays_flat_and_the_rest_keeps_its_bits(method: Any) -> None:
    """Mottling on white paper with a line of text: gone far from the text, untouched at it."""
    reference = torch.full((1, 3, 150, 230), 0.9)
    reference[..., :, 100:104] = -0.9
    image = reference + 0.05 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    plain = {"wavelet": WaveletFixed, "adain": AdainFixed, "ycbcr": YCbCrFixed}[method](View(image), View(reference))
    fixed = color_fixed(View(image), View(reference), method)
    whole = assembled(fixed)
    flat = [slice(0, 100 - 46), slice(104 + 46, None)]
    for columns in flat:
        torch.testing.assert_close(whole[..., columns], reference[..., columns], atol=1e-6, rtol=0)
    near = slice(100 - 1, 104 + 1)
    assert torch.equal(whole[..., near], assembled(plain)[..., near])
    for region in (Region(0, 0, 1, 1), Region(40, 30, 90, 200), Region(149, 229, 150, 230)):
        assert torch.equal(fixed.read(region), region.crop(whole))


def test_a_picture_without_flat_places_and_flat_blocks_of_jpeg_stay_as_they_are() -> None:
    noisy = 0.5 + 0.02 * torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    gradient = torch.linspace(-1, 1, 96).expand(1, 3, 96, 96)
    blocks = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    blocks = resize_bicubic(blocks.repeat_interleave(8, 2).repeat_interleave(8, 3), 128, 128)
    for picture in (noisy, gradient, blocks):
        assert (share := flat_share(picture)) is None or not share.any()
