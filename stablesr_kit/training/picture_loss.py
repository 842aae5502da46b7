"""How far a picture is from the one it should be: a pixel loss and, where the options ask for one, a perceptual one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablesr_kit.training.losses import find_pixel_loss
from stablesr_kit.training.perceptual import PerceptualOptions, load_perceptual_loss


@dataclass(frozen=True, kw_only=True)
class PictureLossOptions(PerceptualOptions):
    """Options of programs whose networks make pictures."""

    pixel_loss: str = "l1"
    """Loss between pictures: l1, mse, or reconstruction, which also weighs gradients, colour and brightness of areas;
    published: l1."""


class PictureLoss:
    """The weighted sum of the losses between pictures that the options name.

    Raises as `find_pixel_loss` and `load_perceptual_loss`.
    """

    def __init__(self, options: PictureLossOptions, device: torch.device) -> None:
        self.pixel_loss = find_pixel_loss(options.pixel_loss)
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
