"""Losses between pictures in [-1, 1] and against a discriminator; each is a mean, whatever the size of the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stablesr_kit.training.losses.perceptual import PerceptualOptions, load_perceptual_loss


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


def flat_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the first differences where the target is flat: holds invented patterns down there.

    A pixel counts 1 / (1 + variance / 0.04^2), with the target's variance in the 7x7 px around it.
    """
    mean, mean_square = (F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False) for x in (target, target**2))
    flatness = 1 / (1 + (mean_square - mean**2).mean(dim=1, keepdim=True).clamp(min=0) / 0.04**2)
    error = image - target
    horizontal = flatness[..., :, 1:] * (error[..., :, 1:] - error[..., :, :-1]).abs()
    vertical = flatness[..., 1:, :] * (error[..., 1:, :] - error[..., :-1, :]).abs()
    return horizontal.mean() + vertical.mean()


def lattice_loss(image: Tensor, target: Tensor, period_px: int = 4) -> Tensor:
    """Size of the pattern that repeats every period_px pixels in all pictures of a batch and not in their targets.

    It is the deviation, over the places in a block of period_px x period_px, of the mean over all blocks of the error
    without its block's own mean. Errors well above 4 levels of 255 are bounded, so that edges do not hide the pattern.
    Decoders paint it where a perceptual loss or a discriminator rewards any texture. Sides must be multiples of
    period_px.
    """
    error = rearrange(image - target, "b c (y p) (x q) -> b c y x p q", p=period_px, q=period_px)
    detail = error - error.mean(dim=(-2, -1), keepdim=True)
    bounded = detail / (1 + detail.abs() / (4 / 127.5))
    pattern = bounded.mean(dim=(0, 2, 3))
    return (pattern.square().mean(dim=(-2, -1)) + 1e-10).sqrt().mean()


PixelLoss = Literal["mse", "l1", "reconstruction"]

PIXEL_LOSSES: dict[PixelLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "reconstruction": reconstruction_loss,
}
"""The losses between pictures by name."""


class AdversarialLoss(NamedTuple):
    """The two sides of a game; each term takes logits of any shape and is a mean over them.

    A discriminator minimises real(D(photo)) + fake(D(restored)), which may be taken back one after the other; the
    generator minimises generator(D(restored)).
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


HINGE = AdversarialLoss(
    real=lambda logits: F.relu(1 - logits).mean(),
    fake=lambda logits: F.relu(1 + logits).mean(),
    generator=lambda logits: -logits.mean(),
)
"""Lim and Ye 2017: real logits above 1 and fake ones below -1 cost nothing."""


def adaptive_adversarial_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, largest: float = 1.0
) -> Tensor:
    """Weight that makes the adversarial loss pull as hard as the reconstruction loss, a scalar without gradient.

    ``|d reconstruction / d last_layer| / (|d adversarial / d last_layer| + 1e-4)``, at most `largest` (Esser et al.
    2021, eq. 7). last_layer: a weight that both losses depend on, usually of the generator's last convolution. largest:
    1 in CodeFormer, 1e4 in VQGAN. Both graphs are kept, so that the losses can still be taken back. Under a scaler of
    half precision give both losses unscaled.
    """
    pull, push = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    )
    return (pull / (push + 1e-4)).clamp(0, largest).detach()


def feature_matching_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """Mean L1 between features of pictures, (B, ...) per layer, in units of the mean size of each real picture's."""

    def size(features: Tensor) -> Tensor:
        return features.float().abs().flatten(1).mean(dim=1)

    terms = [(size(a.float() - b.float()) / size(b).clamp(min=1e-3)).mean() for a, b in zip(fake, real, strict=True)]
    return torch.stack(terms).mean()


@dataclass(frozen=True, kw_only=True)
class PictureLossOptions(PerceptualOptions):
    """The loss between pictures."""

    pixel_loss: PixelLoss = "l1"
    """Loss between pictures; reconstruction also weighs gradients, colour and brightness of areas. Published: l1."""


class PictureLoss:
    """The weighted sum of the losses between pictures that the options name.

    Raises as `load_perceptual_loss`.
    """

    def __init__(self, options: PictureLossOptions, device: torch.device) -> None:
        self.pixel_loss = PIXEL_LOSSES[options.pixel_loss]
        self.perceptual = load_perceptual_loss(options)
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.perceptual_factor = options.perceptual_factor

    def __call__(self, fake: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures (B, 3, H, W) in [-1, 1], a scalar, and its terms for the record."""
        loss = self.pixel_loss(fake, target)
        terms = {"pixel": loss}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, target)
            loss = loss + self.perceptual_factor * terms["perceptual"]
        return loss, terms
