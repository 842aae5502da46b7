"""Colour fix against the reference tensors of `colorfix.safetensors`."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from stablesr_kit.imaging.color_fix import adain_color_fix, blur, wavelet_color_fix, wavelet_decomposition
from tests.parity.references import Ours, Quantity, Reference, compare, read_tensors

TOLERANCE = 2e-5


def check_colorfix(folder: Path) -> Iterator[Quantity]:
    """Every quantity of colorfix.safetensors; infinity for a name not understood."""
    reference = read_tensors(folder / "colorfix.safetensors")
    given = Reference({key: tensor.float() for key, tensor in reference.items()})
    split = cache(lambda: wavelet_decomposition(given["in_content"]))
    ours: Ours = {
        "out_wavelet": lambda: wavelet_color_fix(given["in_content"], given["in_style"]),
        "out_adain": lambda: adain_color_fix(given["in_content"], given["in_style"]),
        "out_high": lambda: split()[0],
        "out_low": lambda: split()[1],
    }
    for name in given:
        if name.startswith("out_blur_r"):
            radius = int(name.removeprefix("out_blur_r"))
            ours[name] = partial(lambda radius: blur(given["in_content"], radius=radius), radius)
    expected = {name: given[name] for name in given if name not in ("in_content", "in_style")}
    yield from compare("colorfix", expected, ours, TOLERANCE)
