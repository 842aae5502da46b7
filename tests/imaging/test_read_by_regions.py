"""Pictures that are enlarged, padded and restored where they are read: every region has the bits of the whole."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stablesr_kit import Tiling
from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.canvas import Canvas, Part, Readable, Region, View, assembled
from stablesr_kit.imaging.resizing import Enlarged, Padded, reduced, resize_bicubic, resized
from stablesr_kit.pipelines.pictures import pixel_bands, to_pil
from tests.helpers.tiny import seeded, tiny_picture, tiny_pipeline

IMAGE = tiny_picture(23, 31) * 2 - 1


def same_in_every_region(readable: Readable, whole: torch.Tensor) -> None:
    _, height, width = readable.shape
    for region in (
        Region(0, 0, 1, 1),
        Region(0, min(3, width - 1), height, min(9, width)),
        Region(height // 2, 0, height, width),
    ):
        assert torch.equal(readable.read(region), region.crop(whole))


@pytest.mark.parametrize("size", [(23, 31), (92, 124), (46, 31), (40, 97), (230, 32)])
def test_an_enlarged_picture_is_that_of_torch(size: tuple[int, int]) -> None:
    enlarged = resized(View(IMAGE), *size)
    whole = assembled(enlarged)
    torch.testing.assert_close(whole, resize_bicubic(IMAGE, *size), atol=2e-5, rtol=0)
    same_in_every_region(enlarged, whole)


def test_four_times_is_that_of_torch_to_the_last_bits() -> None:
    whole = assembled(Enlarged(View(IMAGE), 92, 124))
    torch.testing.assert_close(whole, resize_bicubic(IMAGE, 92, 124), atol=5e-7, rtol=0)


def test_a_picture_that_shrinks_on_either_side_is_antialiased() -> None:
    for size in ((11, 15), (46, 15), (11, 62)):
        assert torch.equal(assembled(resized(View(IMAGE), *size)), resize_bicubic(IMAGE, *size))


@pytest.mark.parametrize("size", [(23, 31), (11, 15), (6, 8), (23, 7), (1, 1), (200, 3)])
@pytest.mark.parametrize("given", [(23, 31), (600, 31)])
def test_a_reduced_picture_is_that_of_pillow(given: tuple[int, int], size: tuple[int, int]) -> None:
    image = tiny_picture(*given) * 2 - 1
    smaller = reduced(View(image), *size)
    whole = assembled(smaller)
    planes = [Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.LANCZOS) for plane in image[0]]
    np.testing.assert_allclose(whole[0].numpy(), np.stack([np.asarray(plane) for plane in planes]), atol=2e-6)
    same_in_every_region(smaller, whole)


@pytest.mark.parametrize("size", [(23, 31), (24, 32), (50, 31), (23, 100)])
def test_padding_is_reflection(size: tuple[int, int]) -> None:
    whole = np.pad(IMAGE[0].numpy(), [(0, 0), (0, size[0] - 23), (0, size[1] - 31)], mode="reflect")
    padded = Padded(View(IMAGE), *size)
    assert np.array_equal(assembled(padded)[0].numpy(), whole)
    same_in_every_region(padded, torch.from_numpy(whole)[None])


def test_a_part_is_read_at_its_place() -> None:
    part = Part(View(IMAGE), Region(3, 5, 20, 30))
    assert torch.equal(assembled(part), IMAGE[..., 3:20, 5:30])
    same_in_every_region(part, IMAGE[..., 3:20, 5:30])


def test_pixels_are_those_of_diffusers() -> None:
    pipeline = tiny_pipeline(with_text=False)
    image = 1.2 * torch.randn(1, 3, 600, 7, generator=seeded(0))
    (expected,) = pipeline.image_processor.postprocess(image, output_type="pil")
    assert np.array_equal(np.asarray(to_pil(View(image))), np.asarray(expected))
    deep = np.concatenate(list(pixel_bands(View(image), np.uint16)))
    assert deep.shape == (600, 7, 3)
    assert np.array_equal((deep / 257).round(), np.asarray(expected))


@pytest.mark.parametrize(
    "options",
    [{"tiling": Tiling(tile_px=32, vae_tile_px=24)}, {"tiling": Tiling(tile_px="none")}, {"color_fix": "adain"}],
)
def test_canvases_in_and_out_give_the_bits_of_pictures(options: dict[str, Any], tmp_path: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pictures = [tiny_picture(9, 12, seed=seed) for seed in (0, 1)]

    def call(image: Any, output_type: str) -> Any:
        return pipeline(image, generator=seeded(0), output_type=output_type, num_images_per_prompt=2, **options).images

    expected = call(torch.cat(pictures), "pt")
    restored = call([Canvas.from_tensor(one * 2 - 1, tmp_path) for one in pictures], "canvas")
    assert [one.shape for one in restored] == [(3, 36, 48)] * 4
    for one, other in zip(restored, expected, strict=True):
        same_in_every_region(one, assembled(one))
        assert torch.equal((assembled(one)[0] * 0.5 + 0.5).clamp(0, 1), other)


def test_post_stages_see_canvases_whole() -> None:
    pipeline = tiny_pipeline(with_text=False)
    lq = tiny_picture(9, 12) * 2 - 1
    seen = []

    def invert(images: torch.Tensor, lq_images: torch.Tensor) -> torch.Tensor:
        seen.append(lq_images)
        return -images

    plain, inverted = (
        pipeline(View(lq), generator=seeded(0), output_type="canvas", post_stages=stages).images[0]
        for stages in ((), (invert,))
    )
    assert torch.equal(assembled(inverted), -assembled(plain))
    assert torch.equal(seen[0], lq)


def test_canvases_of_other_shapes_are_refused_in_one_line() -> None:
    pipeline = tiny_pipeline(with_text=False)
    for images in ([View(IMAGE), View(IMAGE[..., 1:])], View(IMAGE[:, :1])):
        with pytest.raises(ImageError, match=r"canvases of shapes \[.*\] are given, expected three channels and one"):
            pipeline(images)
