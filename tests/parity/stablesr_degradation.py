"""Degradations against the reference tensors of `degradation.safetensors`."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
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

TOLERANCE = 1e-5
# The parameters of the kernels are stored in float32.
KERNEL_TOLERANCE = 1e-6
# A residual that lies on the threshold may fall on either side of it and moves its neighbourhood by up to 5e-5.
SHARPENING_TOLERANCE = 1e-4
# Mean error: a coefficient that lies between two levels may be rounded to either, which moves a block by up to 6e-5.
JPEG_MEAN_TOLERANCE = 2e-4


def check_degradation(folder: Path) -> Iterator[tuple[str, float, float]]:
    """(name, max_abs_diff, tolerance) of each quantity in degradation.safetensors; infinity for a name not understood.

    For the JPEG, whose coefficients are rounded, the difference is the mean one.
    """
    reference = load_file(folder / "degradation.safetensors")
    image = reference.pop("in_img").float()
    quality = reference.pop("in_quality").float()
    kernels_2d = reference.pop("filter2D_kernel").float()

    decoded = jpeg(image, quality, official_quirks=True)
    yield "degradation.out_jpeg", (decoded - reference.pop("out_jpeg")).abs().mean().item(), JPEG_MEAN_TOLERANCE
    yield "degradation.out_usm", _difference(usm_sharpen(image), reference.pop("out_usm")), SHARPENING_TOLERANCE
    filtered = filter2d(image, kernels_2d)
    yield "degradation.out_filter2D", _difference(filtered, reference.pop("out_filter2D")), TOLERANCE

    ours = _kernels(reference)
    for name in sorted(name for name in reference if "_params_" not in name):
        difference = _difference(ours[name], reference[name]) if name in ours else float("inf")
        yield f"degradation.{name}", difference, KERNEL_TOLERANCE


def _kernels(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our kernel for each that the reference gives parameters of, by the reference's names."""
    blur = gaussian_kernel(SHARPENING_KERNEL_SIZE, SHARPENING_SIGMA, SHARPENING_SIGMA)
    ours = {"usm_kernel1d": blur.sum(0)}
    for name, parameters in reference.items():
        if name.endswith("_params_size_sigx_sigy_theta_beta"):
            size, sigma_x, sigma_y, theta, beta = parameters.tolist()
            size = int(size)
            for shape, axes in {"iso": (sigma_x, sigma_x, 0.0), "aniso": (sigma_x, sigma_y, theta)}.items():
                key = name.partition("_")[0]
                ours[f"{key}_gauss_{shape}"] = gaussian_kernel(size, *axes)
                ours[f"{key}_gen_{shape}"] = generalised_gaussian_kernel(size, *axes, beta=beta)
                ours[f"{key}_plateau_{shape}"] = plateau_kernel(size, *axes, beta=beta)
        elif name.endswith("_params_omega_size"):
            cutoff, size = parameters.tolist()
            key = name.partition("_")[0]
            ours[key] = pad_kernel(sinc_kernel(int(size), cutoff), reference[key].shape[-1])
    return ours


def _difference(ours: Tensor, reference: Tensor) -> float:
    return (ours - reference).abs().max().item() if ours.shape == reference.shape else float("inf")
