"""Image batches at another size."""

import torch.nn.functional as F
from torch import Tensor


def resize_bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """The image (B, 3, h, w) in [-1, 1] at the size (B, 3, height, width), clamped; antialiased where it shrinks."""
    if (height, width) == tuple(image.shape[-2:]):
        return image
    shrinks = height < image.shape[-2] or width < image.shape[-1]
    return F.interpolate(image, (height, width), mode="bicubic", antialias=shrinks).clamp(-1, 1)
