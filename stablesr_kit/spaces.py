"""The three spaces a picture lives in, and the only conversions between them.

- pixels: uint8 numpy array, (H, W, 3), RGB: what files hold.
- image: float tensor, (B, 3, H, W), in [-1, 1]: what the autoencoder reads and writes.
- latent: float tensor, (B, C, h, w), scaled to unit variance: what the UNet and the time-aware encoder see.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def pixels_to_image(pixels: np.ndarray) -> Tensor:
    """Image (1, 3, H, W), float32, of one uint8 picture (H, W, 3)."""
    return unit_to_image(torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255)


def unit_to_image(unit: Tensor) -> Tensor:
    """Image of a float tensor in [0, 1], the range in which diffusers takes and returns pictures."""
    return unit * 2 - 1


def image_to_pixels(image: Tensor) -> np.ndarray:
    """Pixels (B, H, W, 3) of an image batch (B, 3, H, W); clamped to [-1, 1] and rounded to the nearest level."""
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_latent(z: Tensor, vae: "AutoencoderKL") -> Tensor:
    """Latent of the autoencoder's raw code z: (z - shift) * scaling_factor of its config."""
    return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def from_latent(latent: Tensor, vae: "AutoencoderKL") -> Tensor:
    """Raw code z that the autoencoder decodes; the inverse of `to_latent`."""
    return latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
