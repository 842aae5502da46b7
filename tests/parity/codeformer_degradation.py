"""CodeFormer's degradations against `training.safetensors`.

The references were drawn from the global generators of Python and NumPy, ours come from explicit ones: the draws are
repeated here in the published order (specification, section 5), and what is done with them is the toolkit's. The JPEG
of the references is a file's, and so is that of the check; the toolkit's own is compared with files by
tests/test_degradations_parts.py.
"""

import io
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stablesr_kit.imaging.degradations.classical import ClassicalConfig, Stroke, paint_strokes
from stablesr_kit.imaging.degradations.draws import to_grey
from stablesr_kit.imaging.degradations.filtering import filter2d, gaussian_kernel, resize
from stablesr_kit.imaging.degradations.pairs import CODEFORMER, CODEFORMER_SMALL
from tests.parity.references import Ours, Quantity, Reference, checked, compare, difference

KERNEL_TOLERANCE = 1e-12
# Two levels of 8 bit, in [-1, 1]: what lies between two may be rounded to either, before the JPEG and after it.
DEGRADED_TOLERANCE = 4 / 255 + 1e-6
LARGEST_SHIFT = 20 / 255


def check_degradations(reference: Reference[Tensor], facts: Reference[Any]) -> Iterator[Quantity]:
    """Mixed kernels, degraded pictures and masks, each from the seed in its name; infinity for another name."""

    def target() -> Tensor:
        return reference["gt_bgr_u8"].flip(-1).permute(2, 0, 1)[None] / 255

    pictures = dict.fromkeys(re.sub(r"\.in(_large_de)?$", "", key) for key in reference if key.startswith("deg."))
    names = [key for key in sorted(reference) if key.startswith(("kernel.mixed", "brush."))]
    for name in [*names, *pictures]:
        seed = re.search(r"seed(\d+)", name)
        if not seed or (name in pictures and name in reference):
            yield f"training.{name}", float("inf"), 0.0
            continue
        random.seed(int(seed[1]))
        np.random.seed(int(seed[1]))
        if name.startswith("kernel."):
            kernel = draw_kernel(len(reference[name]), CODEFORMER)
            yield f"training.{name}", difference(kernel, reference[name]), KERNEL_TOLERANCE
        elif name.startswith("brush."):
            yield from check_strokes(name, reference, facts, target)
        else:
            yield from check_picture(name, reference, facts, target)


def check_strokes(
    name: str, reference: Reference[Tensor], facts: Reference[Any], target: Callable[[], Tensor]
) -> Iterator[Quantity]:
    """A picture with strokes, and how much of it they cover."""
    size = reference[name].shape[0], reference[name].shape[1]
    mask = paint_strokes(*size, draw_strokes(*size))

    def painted() -> float:
        levels = (torch.maximum(target()[0], mask) * 255).flip(0).permute(1, 2, 0)
        return difference(levels.round(), reference[name])

    yield from checked(f"training.{name}", painted, 0.0)
    fact = f"{name}.white_fraction"
    if fact in facts:
        yield f"training.{fact}", abs(mask.mean().item() - facts[fact]), 1e-6


def check_picture(
    name: str, reference: Reference[Tensor], facts: Reference[Any], target: Callable[[], Tensor]
) -> Iterator[Quantity]:
    """One picture of the dataset: mirrored or not, damaged once, or weakly and then strongly, its colours changed."""
    is_mirrored = random.random() < 0.5
    if f"{name}.hflip" in facts:
        yield f"training.{name}.hflip", float(is_mirrored != facts[f"{name}.hflip"]), 0.0

    @cache
    def damaged() -> dict[str, Tensor]:
        picture = target().flip(-1) if is_mirrored else target()
        if "stage3" in name:
            return {"in": damage(picture, CODEFORMER_SMALL), "in_large_de": damage(picture, CODEFORMER)}
        found = damage(picture, CODEFORMER)
        gates = re.search(r"jitter([\d.]+)_gray([\d.]+)", name)
        return {"in": change_colours(found, *map(float, gates.groups())) if gates else found}

    def image(key: str) -> Tensor:
        return (damaged()[key][0] * 255).round().clamp(0, 255) / 127.5 - 1

    kinds = ["in", "in_large_de"] if "stage3" in name else ["in"]
    known: Ours = {f"{name}.{kind}": partial(image, kind) for kind in kinds}
    expected = {key: reference[key] for key in reference if key.startswith(f"{name}.")}
    yield from compare("training", expected, known, DEGRADED_TOLERANCE)


def damage(image: Tensor, config: ClassicalConfig) -> Tensor:
    """{[(I (x) k) down_r + n] JPEG_q} up_r with the published draws from the config's ranges."""
    assert config.jpeg_quality
    image = filter2d(image, draw_kernel(config.kernel_size, config))
    height, width = image.shape[-2:]
    r = np.random.uniform(*config.downsample)
    small = resize(image, (int(height // r), int(width // r)), "bilinear")
    sigma = np.random.uniform(*config.noise_sigma) / 255
    bgr_noise = torch.from_numpy(np.random.randn(*small.shape[2:], 3).astype(np.float32) * sigma)
    noisy = (small + bgr_noise.flip(-1).permute(2, 0, 1)).clamp(0, 1)
    return resize(jpeg_file(noisy, int(np.random.uniform(*config.jpeg_quality))), (height, width), "bilinear")


def draw_kernel(size: int, config: ClassicalConfig) -> Tensor:
    assert config.blur_sigma
    is_round = random.choices((True, False), (0.5, 0.5))[0]
    sigma_x = np.random.uniform(*config.blur_sigma)
    if is_round:
        return gaussian_kernel(size, sigma_x, sigma_x)
    return gaussian_kernel(size, sigma_x, np.random.uniform(*config.blur_sigma), np.random.uniform(-math.pi, math.pi))


def jpeg_file(image: Tensor, quality: int) -> Tensor:
    """The picture (1, 3, H, W) in [0, 1] as a JPEG file returns it."""
    file = io.BytesIO()
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255


def change_colours(image: Tensor, shift_probability: float, grey_probability: float) -> Tensor:
    if np.random.uniform() < shift_probability:
        bgr_shift = torch.from_numpy(np.random.uniform(-LARGEST_SHIFT, LARGEST_SHIFT, 3)).float()
        image = (image + bgr_shift.flip(0).view(3, 1, 1)).clamp(0, 1)
    if np.random.uniform() < grey_probability:
        image = to_grey(image).expand_as(image)
    return image


def draw_strokes(height: int, width: int) -> Iterator[Stroke]:
    mean_turn, spread = 2 * math.pi / 5, math.pi / 6
    typical = math.hypot(height, width) / 8
    for _ in range(np.random.randint(1, 4)):
        steps = np.random.randint(8, 28)
        turns = mean_turn - np.random.uniform(0, spread), mean_turn + np.random.uniform(0, spread)
        angles = [np.random.uniform(*turns) for _ in range(steps)]
        x, y = np.random.randint(0, width), np.random.randint(0, height)
        corners = [(y, x)]
        for index, angle in enumerate(angles):
            angle = 2 * math.pi - angle if index % 2 == 0 else angle
            length = np.clip(np.random.normal(typical, typical // 2), 0, 2 * typical)
            x = int(np.clip(x + length * math.cos(angle), 0, width))
            y = int(np.clip(y + length * math.sin(angle), 0, height))
            corners.append((y, x))
        yield Stroke(corners=tuple(corners), width_px=int(np.random.uniform(30, 70)))
