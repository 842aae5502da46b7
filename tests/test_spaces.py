"""The spaces of a picture: conversions invert each other, and no other file converts by hand."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from stablesr_kit import spaces

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "stablesr_kit/spaces.py": "converts for all",
    "stablesr_kit/faces/paste.py": "the mask is blurred in levels of 255, as the published one",
    "stablesr_kit/imaging/color_fix.py": "chroma is judged in levels of 255",
    "stablesr_kit/models/execution.py": "rows of a strip",
    "stablesr_kit/video/motion.py": "flow is found between grey pictures of one channel",
    "stablesr_kit/cli/face_stage.py": "the share of a white mask",
    "stablesr_kit/evaluation/methods.py": "networks of other projects take [0, 1], as torch or numpy",
    "stablesr_kit/evaluation/resampling.py": "places of a mirrored row",
    "stablesr_kit/evaluation/metrics.py": "luma by the published formula, which is stated in levels of 255",
    "benchmarks/seams.py": "thresholds in levels of 255",
}
"""Files that may look like a conversion, with the reason."""


SHAPES = {
    (ast.Div, 2, ast.Add, 1): "(x + 1) / 2",
    (ast.Mult, 0.5, ast.Add, 1): "(x + 1) * 0.5",
    (ast.Sub, 1, ast.Mult, 2): "x * 2 - 1",
    (ast.Add, 0.5, ast.Mult, 0.5): "x * 0.5 + 0.5",
    (ast.Add, 0.5, ast.Div, 2): "x / 2 + 0.5",
}
"""Conversions between [0, 1] and [-1, 1]: outer operation and its constant, inner operation and its constant."""


def conversions(source: str, *, is_degradation: bool = False) -> Iterator[int]:
    """Lines that turn one space into another by arithmetic, or read the scale of a latent.

    is_degradation: there 255 is the unit of strengths, and of rounding within [0, 1].
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("scaling_factor", "shift_factor"):
            yield node.lineno
        if not isinstance(node, ast.BinOp) or (outer := with_constant(node)) is None:
            continue
        operation, constant, inner = outer
        if operation in (ast.Mult, ast.Div) and (constant == 127.5 or constant == 255 and not is_degradation):
            yield node.lineno
        if isinstance(inner, ast.BinOp) and (rest := with_constant(inner)) is not None:
            if (operation, constant, *rest[:2]) in SHAPES:
                yield node.lineno


def with_constant(node: ast.BinOp) -> tuple[type[ast.operator], object, ast.expr] | None:
    """(operation, constant, the other side) where exactly one side is a constant, and the other no NAMED one."""
    left, right = node.left, node.right
    if any(isinstance(side, ast.Name) and side.id.isupper() for side in (left, right)):
        return None
    if isinstance(left, ast.Constant) and not isinstance(right, ast.Constant):
        return type(node.op), left.value, right
    if isinstance(right, ast.Constant) and not isinstance(left, ast.Constant):
        return type(node.op), right.value, left
    return None


def test_only_the_module_of_the_spaces_converts_between_them() -> None:
    found: dict[str, list[int]] = {}
    for folder in ("stablesr_kit", "pipelines", "training", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            lines = list(conversions(path.read_text(), is_degradation="imaging/degradations" in name))
            found |= {name: lines} if lines else {}
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "an exception that is no longer needed"


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("y = x * 2 - 1", True),
        ("y = 2.0 * x - 1", True),
        ("y = (x + 1) / 2", True),
        ("y = (f(x).clamp(-1, 1) + 1) * 0.5", True),
        ("y = x * 0.5 + 0.5", True),
        ("y = x / 2 + 0.5", True),
        ("y = x / 127.5 - 1", True),
        ("y = torch.from_numpy(x) / 255", True),
        ("y = z * vae.config.scaling_factor", True),
        ("y = 2 * (n - 1)", False),
        ("y = (n + 1) // 2", False),
        ("y = (0.03 * 255) ** 2", False),
        ("y = (a + b) / 2", False),
        ("y = x * 2 - z", False),
    ],
)
def test_a_conversion_by_hand_is_found(line: str, is_one: bool) -> None:
    assert bool(list(conversions(line))) is is_one


def test_every_level_survives_the_way_to_an_image_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image = spaces.pixels_to_image(pixels)
    assert (image.shape, image.dtype, image.min().item(), image.max().item()) == ((1, 3, 16, 16), torch.float32, -1, 1)
    np.testing.assert_array_equal(spaces.image_to_pixels(image)[0], pixels)
    levels = pixels[None].astype(np.float32)
    torch.testing.assert_close(spaces.levels_to_image(levels), image, rtol=0, atol=0)
    np.testing.assert_allclose(spaces.image_to_levels(image), levels, rtol=0, atol=2e-5)
    torch.testing.assert_close(spaces.unit_to_image(spaces.image_to_unit(image)), image, rtol=0, atol=1e-7)


def test_pixels_are_clamped_and_rounded_to_the_nearest_level() -> None:
    values = torch.tensor([-2.0, -1 + 1.4 / 255, 0.0, 1 - 0.9 / 255, 2.0]).expand(1, 3, 1, 5)
    assert spaces.image_to_pixels(values)[0, 0, :, 0].tolist() == [0, 1, 128, 255, 255]
    assert spaces.image_to_levels(values)[0, 0, 0, 0] == pytest.approx(-127.5)


def test_latents_are_the_shifted_and_scaled_codes() -> None:
    config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.25)
    vae = cast(Any, SimpleNamespace(config=config))
    z = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latent = spaces.to_latent(z, vae)
    torch.testing.assert_close(latent, (z - 0.25) * 0.5)
    torch.testing.assert_close(spaces.from_latent(latent, vae), z)
    config.shift_factor = None
    torch.testing.assert_close(spaces.to_latent(z, vae), z * 0.5)
