"""The spaces a picture lives in, and the only conversions between them.

- pixels: uint8 numpy array, (H, W, 3), RGB: what files hold. *levels* are the same numbers as floats, unrounded, which
  face alignment and pasting compute with.
- unit: float tensor in [0, 1]: what diffusers takes and returns, and what degradations work in.
- image: float tensor, (B, 3, H, W), in [-1, 1]: what the autoencoder reads and writes.
- latent: float tensor, (B, C, h, w), scaled to unit variance: what the UNet and the time-aware encoder see.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def pixels_to_image(pixels: NDArray[np.uint8]) -> Tensor:
    """Image (1, 3, H, W), float32, of one picture (H, W, 3)."""
    return unit_to_image(torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255)


def image_to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Pixels (B, H, W, 3) of an image batch (B, 3, H, W); clamped to [-1, 1] and rounded to the nearest level."""
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def levels_to_image(levels: NDArray[np.float32]) -> Tensor:
    """Image batch (B, 3, H, W), float32, of levels (B, H, W, 3) in 0 ... 255."""
    return unit_to_image(torch.tensor(levels).permute(0, 3, 1, 2) / 255)


def image_to_levels(image: Tensor) -> NDArray[np.float32]:
    """Levels (B, H, W, 3) of an image batch (B, 3, H, W), neither clamped nor rounded."""
    return ((image.detach().float() + 1) * 127.5).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def unit_to_image(unit: Tensor) -> Tensor:
    """Image of a float tensor in [0, 1]."""
    return unit * 2 - 1


def image_to_unit(image: Tensor) -> Tensor:
    """The image in [0, 1]; the inverse of `unit_to_image`."""
    return (image + 1) / 2


def to_latent(z: Tensor, vae: "AutoencoderKL") -> Tensor:
    """Latent of the autoencoder's raw code z: (z - shift) * scaling_factor of its config."""
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def from_latent(latent: Tensor, vae: "AutoencoderKL") -> Tensor:
    """Raw code z that the autoencoder decodes; the inverse of `to_latent`."""
    return latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
