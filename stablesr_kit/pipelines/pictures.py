"""Pictures in any common form as images, and images as pictures again."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from stablesr_kit.errors import ImageError
from stablesr_kit.imaging.canvas import Canvas, Readable, Region, View, assembled, bands
from stablesr_kit.imaging.color_fix import Neutral, neutral_like
from stablesr_kit.imaging.reading import Picture as FilePicture
from stablesr_kit.imaging.reading import as_picture
from stablesr_kit.imaging.resizing import reduced
from stablesr_kit.spaces import image_to_unit, unit_to_image

logger = logging.getLogger(__name__)

Picture = PIL.Image.Image | np.ndarray | Tensor | Readable
OutputType = Literal["pil", "np", "pt", "canvas", "latent"]
Images = list[PIL.Image.Image] | list[Readable] | np.ndarray | Tensor
PostStage = Callable[[Tensor, Tensor], Tensor]

DEFAULT_SCALE = 4.0

LARGE_PIXELS = 100_000
"""Smaller pictures are restored because they are small, and are not warned of."""
FAR_PSNR = 30.0
"""In dB; docs/pictures.md has the measurements."""

# The value of white in each type of number.
_WHITE = {"uint8": 255, "uint16": 65535, "float16": 1, "bfloat16": 1, "float32": 1, "float64": 1, "bool": 1}


def as_readables(picture: Picture | list[Picture] | None) -> list[Readable]:
    """Images (3, h, w) in [-1, 1] of pictures as `to_image` takes them; given canvases are returned and read later.

    Raises:
        ImageError: as `to_image`.
    """
    pictures = picture if isinstance(picture, list) else [picture]
    if not pictures or not all(isinstance(one, Readable) for one in pictures):
        return [View(one) for one in to_image(picture).split(1)]
    canvases = cast(list[Readable], pictures)
    shapes = sorted({tuple(one.shape) for one in canvases})
    if len(shapes) > 1 or shapes[0][0] != 3:
        raise ImageError(
            f"canvases of shapes {shapes} are given, expected three channels and one size; call once per size"
        )
    return canvases


def result_size(height: int, width: int, scale: float | None = None) -> tuple[int, int]:
    """Height and width of the result for a picture of height x width; scale=None is 4."""
    factor = DEFAULT_SCALE if scale is None else scale
    return max(round(height * factor), 1), max(round(width * factor), 1)


def check_finite(decoded: Sequence[Readable], computed_in: torch.dtype, decoded_in: torch.dtype) -> None:
    """Refuse decoded images that are not finite.

    Raises:
        FloatingPointError: a network has overflowed.
    """
    if not all(torch.isfinite(image.read(band)).all() for image in decoded for band in bands(image)):
        raise FloatingPointError(
            f"the restored picture is not finite, computed in {computed_in} and decoded in {decoded_in}; "
            "load the pipeline in bfloat16 or float32"
        )


def finished(
    restored: list[Readable],
    lq: Sequence[Readable],
    post_stages: Sequence[PostStage],
    output_type: OutputType,
    processor: VaeImageProcessor,
    is_grey: bool | None = None,
) -> Images:
    """Restored images (3, H, W) after the post-stages, grey if the LQ ones are, in the form of an output type.

    lq: the LQ images as given, one per restored one. Post-stages get whole images. processor: of a pipeline.
    is_grey: of all pictures, where that is known otherwise.
    """
    for pair in zip(restored, lq, strict=True):
        warn_if_far(*pair)
    if post_stages:
        images, lq_images = (torch.cat([assembled(one) for one in pictures]) for pictures in (restored, lq))
        for stage in post_stages:
            images = stage(images, lq_images)
        restored = [View(one) for one in images.split(1)]
    if is_grey is None:
        restored = [neutral_like(*pair) for pair in zip(restored, lq, strict=True)]
    elif is_grey:
        restored = [Neutral(one) for one in restored]
    if output_type == "canvas":
        return restored
    if output_type == "pil":
        return [to_pil(one) for one in restored]
    return processor.postprocess(torch.cat([assembled(one) for one in restored]), output_type=output_type)


def lq_psnr(restored: Readable, lq: Readable) -> float:
    """PSNR in dB of the image (3, H, W) against the LQ image (3, h, w), the larger one reduced to the smaller size."""
    height, width = (min(sides) for sides in zip(restored.shape[1:], lq.shape[1:], strict=True))
    smaller = reduced(restored, height, width), reduced(lq, height, width)
    squares = 0.0
    for band in bands(smaller[0]):
        one, other = (image_to_unit(image.read(band).float().cpu()).clamp(0, 1) for image in smaller)
        squares += (one - other).square().sum(dtype=torch.float64).item()
    return 10 * math.log10(3 * height * width / max(squares, 1e-9))


def warn_if_far(restored: Readable, lq: Readable) -> None:
    """Log a warning if a picture that is not small has changed so much that a sharp one has become worse."""
    if lq.shape[1] * lq.shape[2] < LARGE_PIXELS:
        return
    if (found := lq_psnr(restored, lq)) < FAR_PSNR:
        logger.warning(
            "the result at the picture's size differs much from the picture (PSNR %.1f dB, less than %g): if that was "
            "sharp, the result is worse",
            found,
            FAR_PSNR,
        )


def to_canvas(source: FilePicture, folder: Path | None = None) -> Canvas:
    """Image (3, h, w) in [-1, 1] of a picture in a file, read by rows. folder: of the canvas.

    Raises:
        ImageError: the file is truncated or damaged.
        OutputError: the disk is full.
    """
    canvas = Canvas(3, source.height, source.width, folder=folder)
    top = 0
    for band in source.bands():
        canvas.write(Region(top, 0, top + len(band), source.width), to_image(band[..., :3]))
        top += len(band)
    return canvas


def pixel_bands(image: Readable, dtype: type[np.unsignedinteger] = np.uint8) -> Iterator[np.ndarray]:
    """RGB (rows, W, 3) of an image (3, H, W) in [-1, 1], clamped, from top to bottom; white is the dtype's maximum."""
    for band in bands(image):
        unit = image_to_unit(image.read(band)[0].float()).clamp(0, 1)
        levels = (unit * np.iinfo(dtype).max).round()
        yield levels.permute(1, 2, 0).cpu().numpy().astype(dtype)


def to_pil(image: Readable) -> PIL.Image.Image:
    """An RGB picture of an image (3, H, W) in [-1, 1], made band by band."""
    pixels = np.empty((*image.shape[1:], 3), np.uint8)
    top = 0
    for band in pixel_bands(image):
        pixels[top : top + len(band)] = band
        top += len(band)
    return PIL.Image.fromarray(pixels)


def to_image(picture: Picture | list[Picture] | tuple[Picture, ...] | None) -> Tensor:
    """Image batch (B, 3, H, W), float32, in [-1, 1].

    picture: a PIL image, treated like a file of `stablesr restore` (turned upright, 16-bit grey scaled,
    transparency dropped); an array (H, W), (H, W, C) or (B, H, W, C); a tensor (H, W), (C, H, W) or (B, C, H, W); or a
    list of these, all of one size. C is 3 (RGB) or 1 (grey). Numbers are uint8, uint16, or floating point in [0, 1].

    Raises:
        ImageError: a picture is empty, not finite, out of range, or has other channels or numbers; or sizes differ.
    """
    pictures = picture if isinstance(picture, list | tuple) else [picture]
    if not pictures:
        raise ImageError("an empty list is given, expected at least one picture")
    batch = [_one_to_image(one) for one in pictures]
    sizes = sorted({tuple(one.shape[2:]) for one in batch})
    if len(sizes) > 1:
        raise ImageError(f"pictures of different sizes (height, width) {sizes} are given; call once per size")
    return torch.cat(batch)


def _one_to_image(picture: Picture | None) -> Tensor:
    if isinstance(picture, PIL.Image.Image):
        if 0 in picture.size:
            raise ImageError(f"an image of {picture.width}x{picture.height} pixels is given, expected at least one")
        try:
            picture = as_picture(picture).pixels[..., :3]
        except (OSError, SyntaxError) as error:  # Pillow decodes a file only when its pixels are needed
            raise ImageError(f"the picture's file is truncated or damaged ({error}); get a whole copy of it") from error
    if not isinstance(picture, np.ndarray | Tensor):
        raise ImageError(
            f"{type(picture).__name__} is given, expected a PIL image, an array or a tensor; "
            "open files with PIL.Image.open"
        )
    shape, dtype = tuple(picture.shape), str(picture.dtype).removeprefix("torch.")
    if isinstance(picture, np.ndarray):
        dtype = picture.dtype.name  # whatever the byte order
    if dtype not in _WHITE:
        raise ImageError(f"numbers of type {dtype} are given, expected uint8, uint16, or floating point in [0, 1]")
    if isinstance(picture, np.ndarray):
        tensor = torch.from_numpy(picture.astype(np.float32, order="C"))
        tensor = tensor.movedim(-1, -3) if tensor.ndim > 2 else tensor
    else:
        tensor = picture.float()
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise ImageError(
            f"a picture of shape {shape} is given, expected three channels or one, "
            "(H, W, 3) in arrays and (3, H, W) in tensors; convert it to RGB"
        )
    if tensor.numel() == 0:
        raise ImageError(f"a picture of shape {shape} is given, expected at least one pixel")
    unit = tensor / _WHITE[dtype]
    low, high = unit.min().item(), unit.max().item()
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # NaN fails here too
        raise ImageError(
            f"values from {low:.4g} to {high:.4g} are given, expected finite ones in [0, 1]; scale them, or give uint8"
        )
    return unit_to_image(unit).expand(-1, 3, -1, -1)
