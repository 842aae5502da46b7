"""What the pipeline takes for a picture, and how it refuses the rest: one line with what was given and expected."""

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ExifTags

from stablesr_kit.errors import ImageError
from stablesr_kit.pipelines.pictures import to_image
from tests.helpers.tiny import tiny_picture

LEVELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3) * 4
GREY = LEVELS[..., 0]


def pixels(picture: Any) -> np.ndarray:
    """uint8 (H, W, 3) of what the pipeline sees; exact, so that rounding cannot hide a wrong scale."""
    image = to_image(picture)
    assert image.shape[0] == 1 and image.dtype == torch.float32
    levels = (image[0].permute(1, 2, 0).double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().to(torch.uint8).numpy()


def grey_of(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        pytest.param(PIL.Image.fromarray(LEVELS), LEVELS, id="RGB"),
        pytest.param(PIL.Image.fromarray(GREY), grey_of(GREY), id="L"),
        pytest.param(PIL.Image.fromarray(GREY > 30), grey_of(np.where(GREY > 30, 255, 0)), id="1"),
        pytest.param(PIL.Image.fromarray(GREY.astype(np.uint16) * 257), grey_of(GREY), id="I;16"),
        pytest.param(PIL.Image.fromarray(GREY.astype(np.int32) * 257), grey_of(GREY), id="I"),
        pytest.param(PIL.Image.fromarray(GREY.astype(np.float32) / 255), grey_of(GREY), id="F"),
        pytest.param(PIL.Image.fromarray(np.dstack([LEVELS, GREY])), LEVELS, id="RGBA"),
        pytest.param(PIL.Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA"), grey_of(GREY), id="LA"),
        pytest.param(PIL.Image.fromarray(LEVELS).quantize(256), LEVELS, id="P"),
        pytest.param(PIL.Image.fromarray(np.dstack([255 - LEVELS, GREY * 0]), "CMYK"), LEVELS, id="CMYK"),
    ],
)
def test_pil_images_of_every_mode_keep_their_levels(picture: PIL.Image.Image, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(pixels(picture), expected)


def test_a_photo_taken_sideways_is_turned_upright() -> None:
    photo = PIL.Image.fromarray(LEVELS)
    photo.getexif()[ExifTags.Base.Orientation] = 6
    np.testing.assert_array_equal(pixels(photo), np.rot90(LEVELS, -1))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(LEVELS, id="uint8"),
        pytest.param(LEVELS.astype(np.uint16) * 257, id="uint16"),
        pytest.param((LEVELS.astype(np.uint16) * 257).astype(">u2"), id="big-endian"),
        pytest.param(LEVELS / 255, id="float64"),
        pytest.param((LEVELS / 255).astype(np.float32), id="float32"),
        pytest.param(LEVELS[None], id="batch"),
        pytest.param(torch.tensor(LEVELS).permute(2, 0, 1), id="uint8 tensor"),
        pytest.param(torch.tensor(LEVELS).permute(2, 0, 1)[None] / 255, id="float tensor batch"),
        pytest.param((torch.tensor(LEVELS).permute(2, 0, 1) / 255).double().requires_grad_(), id="with gradient"),
    ],
)
def test_arrays_and_tensors_of_every_kind_keep_their_levels(picture: Any) -> None:
    with torch.no_grad():
        np.testing.assert_array_equal(pixels(picture), LEVELS)


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(GREY, id="(H, W)"),
        pytest.param(GREY[..., None], id="(H, W, 1)"),
        pytest.param(torch.tensor(GREY), id="tensor (H, W)"),
        pytest.param(torch.tensor(GREY)[None] / 255, id="tensor (1, H, W)"),
    ],
)
def test_one_channel_is_grey(picture: Any) -> None:
    np.testing.assert_array_equal(pixels(picture), grey_of(GREY))


def test_a_view_with_negative_strides_and_a_read_only_array_are_taken_and_left_as_they_are() -> None:
    flipped = LEVELS[::-1, ::-1]
    np.testing.assert_array_equal(pixels(flipped), flipped)
    frozen = (LEVELS / 255).astype(np.float32)
    frozen.setflags(write=False)
    to_image(frozen).add_(1)  # an image of its own: nothing the caller holds changes
    np.testing.assert_array_equal(frozen, (LEVELS / 255).astype(np.float32))


def test_the_image_is_a_copy_of_the_tensor() -> None:
    tensor = tiny_picture()
    before = tensor.clone()
    to_image(tensor).zero_()
    assert torch.equal(tensor, before)


def test_batches_and_lists_are_joined_in_order() -> None:
    one, two = tiny_picture(seed=1), tiny_picture(seed=2)
    expected = torch.cat([one, two, one]) * 2 - 1
    assert torch.equal(to_image(torch.cat([one, two, one])), expected)
    assert torch.equal(to_image([one, two[0], one]), expected)
    assert torch.equal(to_image((torch.cat([one, two]), one)), expected)
    arrays = torch.cat([one, two, one]).permute(0, 2, 3, 1).numpy()
    assert torch.equal(to_image(arrays), expected)


def truncated_photo() -> PIL.Image.Image:
    file = io.BytesIO()
    PIL.Image.fromarray(np.tile(LEVELS, (20, 20, 1))).save(file, "PNG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:-200]))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        pytest.param([], "an empty list is given, expected at least one picture", id="empty list"),
        pytest.param("photo.jpg", "str is given, expected a PIL image, an array or a tensor; open files", id="path"),
        pytest.param(np.zeros((4, 5, 4)), r"shape \(4, 5, 4\) is given, expected three channels.*convert", id="RGBA"),
        pytest.param(np.zeros((3, 4, 5)), r"shape \(3, 4, 5\) .*\(H, W, 3\) in arrays", id="channels first"),
        pytest.param(torch.zeros(4, 5, 3), r"shape \(4, 5, 3\) .*\(3, H, W\) in tensors", id="channels last"),
        pytest.param(torch.zeros(1, 1, 3, 4, 5), "expected three channels", id="five dimensions"),
        pytest.param(torch.zeros(5), "expected three channels", id="one dimension"),
        pytest.param(np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\) is given, expected at least one pixel", id="0"),
        pytest.param(PIL.Image.new("RGB", (0, 5)), "0x5 pixels is given, expected at least one", id="empty PIL"),
        pytest.param(torch.full((3, 4, 5), torch.nan), r"values from nan to nan .* finite ones in \[0, 1\]", id="NaN"),
        pytest.param(torch.full((3, 4, 5), torch.inf), r"values from inf to inf .* finite", id="infinite"),
        pytest.param(np.full((4, 5, 3), 128.0), r"values from 128 to 128 .*\[0, 1\]; scale them", id="0 to 255"),
        pytest.param(torch.full((3, 4, 5), -0.5), "values from -0.5 to -0.5", id="-1 to 1"),
        pytest.param(LEVELS.astype(np.int64), "type int64 are given, expected uint8", id="int64"),
        pytest.param(np.full((4, 5, 3), None), "type object are given, expected uint8", id="objects"),
        pytest.param(PIL.Image.new("HSV", (4, 5)), "colour mode HSV is not supported; convert it to RGB", id="HSV"),
        pytest.param(PIL.Image.new("F", (4, 5), 7.0), "float numbers go from 7 to 7, expected 0 .* to 1", id="F"),
        pytest.param(truncated_photo(), "truncated or damaged .*; get a whole copy", id="truncated"),
        pytest.param(
            [tiny_picture(4, 4), tiny_picture(4, 5)],
            r"different sizes \(height, width\) \[\(4, 4\), \(4, 5\)\] are given; call once per size",
            id="sizes",
        ),
    ],
)
def test_what_is_not_a_picture_is_refused_in_one_line(picture: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        to_image(picture)
    assert "\n" not in str(error.value)
