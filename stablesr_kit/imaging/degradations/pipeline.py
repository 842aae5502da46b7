"""From a good picture to the pair a restorer learns from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from stablesr_kit.imaging.degradations.classical import ClassicalConfig, degrade_classical
from stablesr_kit.imaging.degradations.draws import chance
from stablesr_kit.imaging.degradations.filtering import usm_sharpen
from stablesr_kit.imaging.degradations.noise import to_grey
from stablesr_kit.imaging.degradations.presets import DegradationConfig
from stablesr_kit.imaging.degradations.resizing import resize
from stablesr_kit.imaging.degradations.second_order import degrade_second_order
from stablesr_kit.spaces import image_to_unit, unit_to_image


class Pair(NamedTuple):
    """What a restorer is given and what it should return; both (B, 3, H, W) in [-1, 1]."""

    lq: Tensor
    hq: Tensor


def degrade(hq: Tensor, config: DegradationConfig, generator: Generator | Sequence[Generator]) -> Tensor:
    """Low-quality picture (B, 3, H, W) in [-1, 1] of hq, likewise; enlarged to the size of hq (see `make_pair`)."""
    return make_pair(hq, config, generator).lq


@torch.no_grad()
def make_pair(hq: Tensor, config: DegradationConfig, generator: Generator | Sequence[Generator]) -> Pair:
    """Degraded picture and target of hq (B, 3, H, W) in [-1, 1]; the target is hq unless the config changes it.

    generator: on any device; a CPU generator gives the same draws for pictures on any device. With one generator, a
    batch shares the draws that its pictures must have in common; with one generator per picture, each is degraded
    for itself and does not depend on the others.
    Raises ImageError where the picture is too small for the kernels of the config.
    """
    if not isinstance(generator, Generator):
        pairs = [make_pair(picture, config, own) for picture, own in zip(hq.split(1), generator, strict=True)]
        return Pair(torch.cat([pair.lq for pair in pairs]), torch.cat([pair.hq for pair in pairs]))

    target = image_to_unit(hq.float())
    if config.sharpen_target:
        target = usm_sharpen(target)
    if chance(config.clean_probability, generator):
        lq = target
    elif isinstance(config, ClassicalConfig):
        lq, is_grey = degrade_classical(target, config, generator)
        if config.grey_target:
            target = torch.where(is_grey.view(-1, 1, 1, 1), to_grey(target), target)
    else:
        lq = degrade_second_order(target, config, generator)
        lq = resize(lq, (hq.shape[-2], hq.shape[-1]), "bicubic").clamp(0, 1)
    return Pair(unit_to_image(lq).to(hq.dtype), unit_to_image(target).to(hq.dtype))
