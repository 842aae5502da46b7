"""Degradations against the reference tensors of `degradation.safetensors`."""

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from stablesr_kit.imaging.degradations.filtering import (
    SHARPENING_KERNEL_SIZE,
    SHARPENING_SIGMA,
    filter2d,
    gaussian_kernel,
    generalised_gaussian_kernel,
    pad_kernel,
    plateau_kernel,
    sinc_kernel,
    usm_sharpen,
)
from stablesr_kit.imaging.degradations.jpeg import jpeg
from tests.parity.references import Ours, Quantity, Reference, compare, difference, read_tensors

# The parameters of the kernels are stored in float32.
KERNEL_TOLERANCE = 1e-6
TOLERANCES = {
    # Mean error: a coefficient between two levels may be rounded to either, which moves a block by up to 6e-5.
    "out_jpeg": 2e-4,
    # A residual on the threshold may fall on either side of it and moves its neighbourhood by up to 5e-5.
    "out_usm": 1e-4,
    "out_filter2D": 1e-5,
}


def check_degradation(folder: Path) -> Iterator[Quantity]:
    """Every quantity of degradation.safetensors; infinity for a name not understood.

    For the JPEG, whose coefficients are rounded, the difference is the mean one.
    """
    reference = read_tensors(folder / "degradation.safetensors")
    image = cache(lambda: reference["in_img"].float())
    pictures: Ours = {
        "out_jpeg": lambda: jpeg(image(), reference["in_quality"].float(), official_quirks=True),
        "out_usm": lambda: usm_sharpen(image()),
        "out_filter2D": lambda: filter2d(image(), reference["filter2D_kernel"].float()),
    }
    for name, tolerance in TOLERANCES.items():
        expected = {name: reference[name]} if name in reference else {}
        measure = mean_difference if name == "out_jpeg" else difference
        yield from compare("degradation", expected, pictures, tolerance, measure)
    inputs = {"in_img", "in_quality", "filter2D_kernel"}
    expected = {
        name: tensor
        for name, tensor in reference.items()
        if name not in inputs and name not in pictures and "_params_" not in name
    }
    yield from compare("degradation", expected, kernels(reference), KERNEL_TOLERANCE)


def kernels(reference: Reference[Tensor]) -> Ours:
    """Our kernel for each that the reference has, from the parameters it gives."""
    blur = cache(lambda: gaussian_kernel(SHARPENING_KERNEL_SIZE, SHARPENING_SIGMA, SHARPENING_SIGMA))
    ours: Ours = {"usm_kernel1d": lambda: blur().sum(0)}
    for name in reference:
        if bell := re.fullmatch(r"(k\d+)_(gauss|gen|plateau)_(iso|aniso)", name):
            ours[name] = partial(bell_kernel, reference, *bell.groups())
        elif re.fullmatch(r"sinc\d+", name):
            ours[name] = partial(low_pass, reference, name)
    return ours


def bell_kernel(reference: Reference[Tensor], key: str, family: str, axes: str) -> Tensor:
    """A Gaussian, generalised Gaussian or plateau, round or elongated."""
    size, sigma_x, sigma_y, theta, beta = reference[f"{key}_params_size_sigx_sigy_theta_beta"].tolist()
    shape = (int(size), sigma_x, sigma_x, 0.0) if axes == "iso" else (int(size), sigma_x, sigma_y, theta)
    if family == "gauss":
        return gaussian_kernel(*shape)
    return (generalised_gaussian_kernel if family == "gen" else plateau_kernel)(*shape, beta=beta)


def low_pass(reference: Reference[Tensor], key: str) -> Tensor:
    """A sinc kernel, padded to the reference's size."""
    cutoff, size = reference[f"{key}_params_omega_size"].tolist()
    return pad_kernel(sinc_kernel(int(size), cutoff), reference[key].shape[-1])


def mean_difference(ours: Tensor, reference: Tensor) -> float:
    """Mean absolute difference; infinity between different shapes."""
    return (ours - reference).abs().mean().item() if ours.shape == reference.shape else float("inf")
