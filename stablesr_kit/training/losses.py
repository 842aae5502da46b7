"""Losses between pictures in [-1, 1]; each is a mean, so that it does not depend on the size of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical first differences: weighs edges and fine texture."""
    error = image - target
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return horizontal + vertical


def chroma_l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the colour differences R - G and B - G, which L1 in RGB hardly sees."""
    error = image - target
    return (error[:, [0, 2]] - error[:, 1:2]).abs().mean()


def pooled_l1(image: Tensor, target: Tensor, block_px: int) -> Tensor:
    """Mean absolute difference of the means of square blocks: weighs brightness and colour that drift over areas."""
    return F.avg_pool2d(image - target, block_px).abs().mean()


def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    """L1 in RGB, with gradients, colour and the means of 16 px blocks at half its weight each."""
    l1 = (image - target).abs().mean()
    rest = gradient_l1(image, target) + chroma_l1(image, target) + pooled_l1(image, target, 16)
    return l1 + 0.5 * rest


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator (Lim and Ye, 2017): real logits above 1, fake ones below -1 cost nothing."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Loss of the generator against a hinge discriminator."""
    return -fake_logits.mean()


def feature_matching_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """Mean L1 between features of two pictures, each layer measured in units of the real features' mean size."""
    terms = [
        (a.float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-3)
        for a, b in zip(fake, real, strict=True)
    ]
    return torch.stack(terms).mean()
