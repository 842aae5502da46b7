"""Training pairs (lq, hq) from an HQ picture, by a named degradation or by one's own settings."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations.classical import ClassicalConfig, degrade_classical
from stablesr_kit.imaging.degradations.draws import chance, to_grey
from stablesr_kit.imaging.degradations.filtering import resize, usm_sharpen
from stablesr_kit.imaging.degradations.second_order import SecondOrderConfig, degrade_second_order
from stablesr_kit.spaces import image_to_unit, unit_to_image

DegradationConfig = SecondOrderConfig | ClassicalConfig

CLASSICAL = ClassicalConfig()

STABLESR_512 = SecondOrderConfig()
STABLESR_768V = SecondOrderConfig(last_jpeg_quality=(60.0, 95.0), clean_probability=0.0, sharpen_target=False)
STABLESR_FACE = ClassicalConfig(grey_probability=0.01, grey_target=True, clean_probability=0.005)

CODEFORMER = ClassicalConfig(
    blur_sigma=(1.0, 15.0), downsample=(4.0, 30.0), noise_sigma=(0.0, 20.0), jpeg_quality=(30.0, 80.0)
)
CODEFORMER_SMALL = ClassicalConfig(
    blur_sigma=(0.1, 10.0), downsample=(1.0, 12.0), noise_sigma=(0.0, 15.0), jpeg_quality=(60.0, 100.0)
)
CODEFORMER_COLORIZATION = ClassicalConfig(
    blur_sigma=(1.0, 15.0),
    downsample=(4.0, 30.0),
    noise_sigma=(0.0, 20.0),
    jpeg_quality=(30.0, 80.0),
    shift_probability=0.3,
    grey_probability=0.01,
    jitter_probability=0.3,
)
CODEFORMER_INPAINTING = ClassicalConfig(
    blur_sigma=None, downsample=(1.0, 1.0), noise_sigma=(0.0, 0.0), jpeg_quality=None, stroke_probability=1.0
)
CODEFORMER_256 = ClassicalConfig(
    kernel_size=21, blur_sigma=(0.5, 7.5), downsample=(2.0, 15.0), noise_sigma=(0.0, 20.0), jpeg_quality=(30.0, 80.0)
)
CODEFORMER_256_SMALL = ClassicalConfig(
    kernel_size=21, blur_sigma=(0.1, 5.0), downsample=(1.0, 6.0), noise_sigma=(0.0, 15.0), jpeg_quality=(60.0, 100.0)
)

LIGHT = ClassicalConfig(
    kernel_size=13,
    blur_sigma=(0.2, 1.0),
    downsample=(4.0, 4.0),
    down_modes=("area", "bicubic"),
    antialias=True,
    noise_sigma=(0.0, 4.0),
    jpeg_quality=(80.0, 100.0),
    up_mode="bicubic",
)
BICUBIC = ClassicalConfig(
    blur_sigma=None,
    downsample=(4.0, 4.0),
    down_modes=("bicubic",),
    antialias=True,
    noise_sigma=(0.0, 0.0),
    jpeg_quality=None,
    up_mode="bicubic",
)
AREA = ClassicalConfig(
    blur_sigma=None,
    downsample=(4.0, 4.0),
    down_modes=("area",),
    noise_sigma=(0.0, 0.0),
    jpeg_quality=None,
    up_mode="bicubic",
)

BLURRED = ClassicalConfig(
    kernel_size=31,
    blur_sigma=(1.0, 5.0),
    isotropic_probability=0.7,
    downsample=(4.0, 4.0),
    down_modes=("area", "bicubic"),
    antialias=True,
    noise_sigma=(0.0, 2.0),
    jpeg_quality=(85.0, 100.0),
    up_mode="bicubic",
)

PRESETS: dict[str, DegradationConfig] = {
    "stablesr-512": STABLESR_512,
    "stablesr-768v": STABLESR_768V,
    "stablesr-face": STABLESR_FACE,
    "classical": CLASSICAL,
    "codeformer": CODEFORMER,
    "codeformer-small": CODEFORMER_SMALL,
    "codeformer-colorization": CODEFORMER_COLORIZATION,
    "codeformer-inpainting": CODEFORMER_INPAINTING,
    "codeformer-256": CODEFORMER_256,
    "codeformer-256-small": CODEFORMER_256_SMALL,
    "light": LIGHT,
    "bicubic": BICUBIC,
    "area": AREA,
    "blurred": BLURRED,
}
"""Every named degradation."""

DESCRIPTIONS: dict[str, str] = {
    "stablesr-512": "two passes of blur, resizing, noise and JPEG on a sharpened target: StableSR's 512 model",
    "stablesr-768v": "the same without sharpening: StableSR's 768v model",
    "stablesr-face": "one pass, sometimes grey: StableSR's face model",
    "classical": "one pass, {[(I_h (x) k) down_r + n] JPEG_q} up_r, over the whole range of strengths",
    "codeformer": "one strong pass: CodeFormer's stage II, and the large half of stage III",
    "codeformer-small": "one weak pass: the small half of CodeFormer's stage III",
    "codeformer-colorization": "one strong pass with changed or lost colours: CodeFormer's colourisation",
    "codeformer-inpainting": "white brush strokes and nothing else: CodeFormer's inpainting",
    "codeformer-256": "codeformer for faces of 256 px: blur and reduction at half their lengths",
    "codeformer-256-small": "codeformer-small for faces of 256 px",
    "light": "a clean photograph of today, 4x smaller and enlarged again",
    "bicubic": "nothing but 4x smaller by bicubic reduction, and enlarged again",
    "area": "nothing but 4x smaller by the mean of 4x4 pixels, and enlarged again",
    "blurred": "out of focus or shaken, hardly noisy, 4x smaller and enlarged again",
}
"""A line of description for each."""


def find_preset(name: str) -> DegradationConfig:
    """The named degradation. Raises ConfigError, which proposes the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(f"no degradation is called {name!r}; {hint}known: {', '.join(PRESETS)}")


class Pair(NamedTuple):
    """Input and target of a restorer; both (B, 3, H, W) in [-1, 1]."""

    lq: Tensor
    hq: Tensor


def degrade(hq: Tensor, config: DegradationConfig, generator: Generator | Sequence[Generator]) -> Tensor:
    """LQ picture of hq, both (B, 3, H, W) in [-1, 1]; enlarged to the size of hq (see `make_pair`)."""
    return make_pair(hq, config, generator).lq


@torch.no_grad()
def make_pair(hq: Tensor, config: DegradationConfig, generator: Generator | Sequence[Generator]) -> Pair:
    """LQ picture and target for hq (B, 3, H, W) in [-1, 1]; the target is hq unless the config changes it.

    generator: on any device; a CPU generator gives the same draws for pictures on any device. With one generator, the
    pictures of a batch share the draws that they must have in common; with one generator per picture, pictures do not
    depend on each other.
    Raises ImageError if the picture is too small for the kernels of the config.
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
