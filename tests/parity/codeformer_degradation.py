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
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stablesr_kit.imaging.degradations.classical import ClassicalConfig, Stroke, paint_strokes
from stablesr_kit.imaging.degradations.draws import to_grey
from stablesr_kit.imaging.degradations.filtering import filter2d, gaussian_kernel, resize
from stablesr_kit.imaging.degradations.pairs import CODEFORMER, CODEFORMER_SMALL
from tests.parity.references import Quantity, difference

KERNEL_TOLERANCE = 1e-12
# Two levels of 8 bit, in [-1, 1]: what lies between two may be rounded to either, before the JPEG and after it.
DEGRADED_TOLERANCE = 4 / 255 + 1e-6
LARGEST_SHIFT = 20 / 255


def check_degradations(reference: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Quantity]:
    """Mixed kernels, degraded pictures and masks, each from the seed in its name; infinity for another name."""
    target = reference["gt_bgr_u8"].flip(-1).permute(2, 0, 1)[None] / 255
    for key in sorted(key for key in reference if key.startswith(("kernel.mixed", "deg.", "brush."))):
        seed = re.search(r"seed(\d+)", key)
        if not seed:
            yield f"training.{key}", float("inf"), 0.0
            continue
        random.seed(int(seed[1]))
        np.random.seed(int(seed[1]))
        if key.startswith("kernel."):
            kernel = draw_kernel(len(reference[key]), CODEFORMER)
            yield f"training.{key}", difference(kernel, reference[key]), KERNEL_TOLERANCE
        elif key.startswith("brush."):
            mask = paint_strokes(*target.shape[-2:], draw_strokes(*target.shape[-2:]))
            painted = (torch.maximum(target[0], mask) * 255).flip(0).permute(1, 2, 0)
            yield f"training.{key}", difference(painted.round(), reference[key]), 0.0
            fact = f"{key}.white_fraction"
            yield f"training.{fact}", abs(mask.mean().item() - facts[fact]), 1e-6
        elif key.endswith(".in"):
            yield from check_picture(key.removesuffix(".in"), reference, facts, target)
        elif key.removesuffix("_large_de") not in reference or not key.endswith(".in_large_de"):
            yield f"training.{key}", float("inf"), 0.0


def check_picture(name: str, reference: dict[str, Tensor], facts: dict[str, Any], target: Tensor) -> Iterator[Quantity]:
    """One picture of the dataset: mirrored or not, damaged once, or weakly and then strongly, its colours changed."""
    is_mirrored = random.random() < 0.5
    if f"{name}.hflip" in facts:
        yield f"training.{name}.hflip", float(is_mirrored != facts[f"{name}.hflip"]), 0.0
    picture = target.flip(-1) if is_mirrored else target
    if f"{name}.in_large_de" in reference:
        ours = {"in": damage(picture, CODEFORMER_SMALL), "in_large_de": damage(picture, CODEFORMER)}
    else:
        ours = {"in": damage(picture, CODEFORMER)}
    if gates := re.search(r"jitter([\d.]+)_gray([\d.]+)", name):
        ours["in"] = change_colours(ours["in"], *map(float, gates.groups()))
    for key, found in ours.items():
        image = (found[0] * 255).round().clamp(0, 255) / 127.5 - 1
        yield f"training.{name}.{key}", difference(image, reference[f"{name}.{key}"]), DEGRADED_TOLERANCE


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
