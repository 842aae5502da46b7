"""The training side of CodeFormer against `training.safetensors` and `training.json`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.checkpoints.codeformer import load_official_faces
from stablesr_kit.imaging.degradations.kernels import gaussian_kernel
from stablesr_kit.models.vqgan import GumbelQuantizer
from stablesr_kit.training.losses import HINGE
from tests.parity_stablesr import Quantity, difference

TOLERANCE = 1e-5
KERNEL_TOLERANCE = 1e-12
OFFICIAL_KL_WEIGHT = 5e-4
PENDING = ("kernel.mixed", "deg.", "brush.")


def check_training(folder: Path) -> Iterator[Quantity]:
    """Each quantity of both files; infinity for one that is not understood."""
    reference = load_file(folder / "training.safetensors")
    facts = json.loads((folder / "training.json").read_text())
    ours = kernels(reference) | discriminator(reference) | gumbel(reference)
    inputs = {"gt_bgr_u8", "disc.in", "gumbel.in"}
    for key in sorted(key for key in reference if key not in inputs and ".w." not in key):
        tolerance = KERNEL_TOLERANCE if key.startswith("kernel.") else TOLERANCE
        if key.startswith(PENDING):
            yield f"training.{key}", None, tolerance
        else:
            found = difference(ours[key], reference[key]) if key in ours else float("inf")
            yield f"training.{key}", found, tolerance
    yield from hinge(reference, facts["hinge"])
    for key in sorted(key for key in facts if key.startswith("lr_")):
        yield f"training.{key}", None, 0.0


def kernels(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kernels whose sigmas and angle are in their names."""
    ours = {}
    for key, kernel in reference.items():
        shape = key.removeprefix("kernel.").split("_")
        if key.startswith("kernel.iso_"):
            ours[key] = gaussian_kernel(len(kernel), float(shape[1]), float(shape[1]))
        if key.startswith("kernel.aniso_"):
            ours[key] = gaussian_kernel(len(kernel), *map(float, shape[1:]))
    return ours


def discriminator(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits in eval and train mode, and what one pass in train mode does to the running means."""
    network = load_official_faces(part(reference, "disc.w."))
    logits = network(reference["disc.in"])
    network.train()
    return {
        "disc.out_eval": logits,
        "disc.out_train_mode": network(reference["disc.in"]),
        "disc.running_mean_after": network.layers[3].running_mean,
    }


def gumbel(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Gumbel quantiser in eval mode, with torch's generator at 0."""
    weights = {
        name.replace("embed.", "codebook.").replace("proj.", "projection."): tensor
        for name, tensor in part(reference, "gumbel.w.").items()
    }
    quantizer = GumbelQuantizer(
        *weights["codebook.weight"].shape, kl_weight=OFFICIAL_KL_WEIGHT, straight_through=False
    ).eval()
    quantizer.load_state_dict(weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantized = quantizer(reference["gumbel.in"])
    return {
        "gumbel.out_seed0": quantized.features,
        "gumbel.indices_seed0": quantized.indices,
        "gumbel.diff": quantized.loss.view(1),
    }


def hinge(reference: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Quantity]:
    """The hinge losses on the logits that are named as their input, taken as real and as fake ones."""
    logits = reference[facts["on"]]
    both = HINGE.real(logits).item() + HINGE.fake(logits).item()
    yield "training.hinge.d", abs(both - facts["d_real"] - facts["d_fake"]) / 2, TOLERANCE
    yield "training.hinge.g", abs(HINGE.generator(logits).item() - facts["g"]), TOLERANCE


def part(reference: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in reference.items() if name.startswith(prefix)}
