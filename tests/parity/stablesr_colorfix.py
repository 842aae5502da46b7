"""Colour fix against the reference tensors of `colorfix.safetensors`."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from stablesr_kit.imaging.color_fix import adain_color_fix, blur, wavelet_color_fix, wavelet_decomposition

TOLERANCE = 2e-5


def check_colorfix(folder: Path) -> Iterator[tuple[str, float, float]]:
    """(name, max_abs_diff, tolerance) of each quantity in colorfix.safetensors; infinity for a name not understood."""
    reference = load_file(folder / "colorfix.safetensors")
    content, style = reference["in_content"].float(), reference["in_style"].float()
    high, low = wavelet_decomposition(content)
    ours = {
        "out_wavelet": wavelet_color_fix(content, style),
        "out_adain": adain_color_fix(content, style),
        "out_high": high,
        "out_low": low,
    }
    for name in reference:
        if name.startswith("out_blur_r"):
            ours[name] = blur(content, radius=int(name.removeprefix("out_blur_r")))
    for name in sorted(reference.keys() - {"in_content", "in_style"}):
        difference = (ours[name] - reference[name].float()).abs().max().item() if name in ours else float("inf")
        yield f"colorfix.{name}", difference, TOLERANCE
