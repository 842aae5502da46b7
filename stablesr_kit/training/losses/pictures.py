"""Losses between pictures in [-1, 1], and adversarial losses; each is a mean over the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stablesr_kit.training.losses.perceptual import PerceptualOptions, load_perceptual_loss


def gradient_l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical first differences: for edges and fine texture."""
    error = image - target
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return horizontal + vertical


def chroma_l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of R - G and B - G: for colours, to which L1 in RGB is hardly sensitive."""
    error = image - target
    return (error[:, [0, 2]] - error[:, 1:2]).abs().mean()


def pooled_l1(image: Tensor, target: Tensor, block_px: int) -> Tensor:
    """Mean absolute difference of the means of square blocks: for drifts of brightness and colour."""
    return F.avg_pool2d(image - target, block_px).abs().mean()


def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    """L1 in RGB, plus gradients, colours and means of 16 px blocks with weight 0.5 each."""
    l1 = (image - target).abs().mean()
    rest = gradient_l1(image, target) + chroma_l1(image, target) + pooled_l1(image, target, 16)
    return l1 + 0.5 * rest


def flat_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of first differences in flat areas of the target: against invented patterns.

    A pixel has weight 1 / (1 + variance / 0.04^2), with the target's variance in the 7x7 px around it.
    """
    mean, mean_square = (F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False) for x in (target, target**2))
    flatness = 1 / (1 + (mean_square - mean**2).mean(dim=1, keepdim=True).clamp(min=0) / 0.04**2)
    error = image - target
    horizontal = flatness[..., :, 1:] * (error[..., :, 1:] - error[..., :, :-1]).abs()
    vertical = flatness[..., 1:, :] * (error[..., 1:, :] - error[..., :-1, :]).abs()
    return horizontal.mean() + vertical.mean()


def lattice_loss(image: Tensor, target: Tensor, period_px: int = 4) -> Tensor:
    """Amplitude of a pattern with period period_px that is in the pictures of a batch but not in their targets.

    The error is divided into blocks of period_px x period_px, the mean of each block is subtracted, and the blocks are
    averaged; the result is the standard deviation within this mean block. Errors well above 4 levels of 255 are
    bounded, so that edges do not hide the pattern. Decoders tend to paint such patterns if a perceptual loss or a
    discriminator rewards texture. Sides must be multiples of period_px.
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
"""Losses between pictures, by name."""


class AdversarialLoss(NamedTuple):
    """Losses of discriminator and generator; each takes logits of any shape and is a mean over them.

    The discriminator minimises real(D(photo)) + fake(D(restored)), two terms that may be differentiated one after the
    other; the generator minimises generator(D(restored)).
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


HINGE = AdversarialLoss(
    real=lambda logits: F.relu(1 - logits).mean(),
    fake=lambda logits: F.relu(1 + logits).mean(),
    generator=lambda logits: -logits.mean(),
)
"""Hinge loss (Lim and Ye 2017): no loss for real logits above 1 and fake ones below -1."""


def adaptive_adversarial_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, largest: float = 1.0
) -> Tensor:
    """Weight that gives the adversarial loss as large a gradient as the reconstruction loss, a scalar without gradient.

    ``|d reconstruction / d last_layer| / (|d adversarial / d last_layer| + 1e-4)``, at most `largest` (Esser et al.
    2021, eq. 7). last_layer: a weight that both losses depend on, usually of the generator's last convolution. largest:
    1 in CodeFormer, 1e4 in VQGAN. Both graphs are kept for the backward pass. With a gradient scaler, give both losses
    unscaled.
    """
    pull, push = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    )
    return (pull / (push + 1e-4)).clamp(0, largest).detach()


def feature_matching_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """Mean L1 distance of features, (B, ...) per layer, relative to the mean magnitude of the real picture's."""

    def size(features: Tensor) -> Tensor:
        return features.float().abs().flatten(1).mean(dim=1)

    terms = [(size(a.float() - b.float()) / size(b).clamp(min=1e-3)).mean() for a, b in zip(fake, real, strict=True)]
    return torch.stack(terms).mean()


@dataclass(frozen=True, kw_only=True)
class PictureLossOptions(PerceptualOptions):
    """The loss between pictures."""

    pixel_loss: PixelLoss = "l1"
    """Loss between pictures; reconstruction also compares gradients, colours and mean brightness. Published: l1."""


class PictureLoss:
    """The weighted sum of the options' losses between pictures.

    Raises what `load_perceptual_loss` raises.
    """

    def __init__(self, options: PictureLossOptions, device: torch.device) -> None:
        self.pixel_loss = PIXEL_LOSSES[options.pixel_loss]
        self.perceptual = load_perceptual_loss(options)
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.perceptual_factor = options.perceptual_factor

    def __call__(self, fake: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of pictures (B, 3, H, W) in [-1, 1], a scalar, and its terms for the records."""
        loss = self.pixel_loss(fake, target)
        terms = {"pixel": loss}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, target)
            loss = loss + self.perceptual_factor * terms["perceptual"]
        return loss, terms
