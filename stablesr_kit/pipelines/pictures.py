"""Whatever people hold a picture in, as an image batch."""

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from stablesr_kit.errors import ImageError
from stablesr_kit.spaces import pixels_to_image, unit_to_image

Picture = PIL.Image.Image | np.ndarray | Tensor


def to_image(picture: Picture | list[Picture]) -> Tensor:
    """Image batch (B, 3, H, W), float32, in [-1, 1].

    picture: a PIL image of any mode; an array (H, W), (H, W, 3) or (B, H, W, 3), uint8 or float in [0, 1]; a tensor
    (3, H, W) or (B, 3, H, W), float in [0, 1]; or a list of these, all of one size.

    Raises:
        ImageError: empty, not finite, out of range, not three channels, or of different sizes.
    """
    pictures = picture if isinstance(picture, list) else [picture]
    if not pictures:
        raise ImageError("an empty list is given, expected at least one picture")
    batch = [_one_to_image(one) for one in pictures]
    sizes = sorted({tuple(one.shape[2:]) for one in batch})
    if len(sizes) > 1:
        raise ImageError(f"pictures of different sizes (height, width) {sizes} are given; call once per size")
    return torch.cat(batch)


def _one_to_image(picture: Picture) -> Tensor:
    if isinstance(picture, PIL.Image.Image):
        return pixels_to_image(np.asarray(picture.convert("RGB")))
    if isinstance(picture, np.ndarray):
        array = np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture
        unit = array.astype(np.float32) / 255 if array.dtype == np.uint8 else array
        tensor = torch.from_numpy(np.ascontiguousarray(unit))
        tensor = tensor.movedim(-1, -3) if tensor.ndim >= 3 else tensor
    elif isinstance(picture, Tensor):
        tensor = picture
    else:
        raise ImageError(f"{type(picture).__name__} is given, expected a PIL image, an array or a tensor")
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ImageError(f"a picture of shape {tuple(picture.shape)} is given, expected three channels (RGB)")
    if tensor.numel() == 0:
        raise ImageError(f"a picture of shape {tuple(picture.shape)} is given, expected at least one pixel")
    low, high = tensor.min().item(), tensor.max().item()
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # NaN fails here too
        raise ImageError(f"values from {low:.4g} to {high:.4g} are given, expected finite ones in [0, 1]")
    return unit_to_image(tensor.float())
