"""The training side of CodeFormer against `training.safetensors` and `training.json`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stablesr_kit.checkpoints.codeformer import load_official_faces
from stablesr_kit.imaging.degradations.filtering import gaussian_kernel
from stablesr_kit.models.vqgan import GumbelQuantizer
from stablesr_kit.training.losses.pictures import HINGE
from stablesr_kit.training.run.config import MULTISTEP, WARMUP_PLATEAU_COSINE, RunConfig
from stablesr_kit.training.run.optimizers import learning_rate_schedule
from tests.parity.codeformer_degradation import KERNEL_TOLERANCE, check_degradations
from tests.parity.references import Quantity, difference

TOLERANCE = 1e-5
SCHEDULE_TOLERANCE = 1e-9
OFFICIAL_KL_WEIGHT = 5e-4
DEGRADATIONS = ("kernel.mixed", "deg.", "brush.")


def check_training(folder: Path) -> Iterator[Quantity]:
    """Each quantity of both files; infinity for one that is not understood."""
    reference = load_file(folder / "training.safetensors")
    facts = json.loads((folder / "training.json").read_text())
    ours = kernels(reference) | discriminator(reference) | gumbel(reference)
    inputs = {"gt_bgr_u8", "disc.in", "gumbel.in"}
    for key in sorted(key for key in reference if key not in inputs and ".w." not in key):
        if not key.startswith(DEGRADATIONS):
            tolerance = KERNEL_TOLERANCE if key.startswith("kernel.") else TOLERANCE
            yield f"training.{key}", difference(ours[key], reference[key]) if key in ours else float("inf"), tolerance
    yield from check_degradations(reference, facts)
    yield from hinge(reference, facts["hinge"])
    for key in sorted(key for key in facts if key.startswith("lr_")):
        yield f"training.{key}", relative_to_schedule(key, facts[key]), SCHEDULE_TOLERANCE


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


def relative_to_schedule(name: str, rates: dict[str, float]) -> float:
    """Largest relative difference of the rates at the iterations, the first being 1; infinity for another name."""
    number = r"([\d.]+(?:e-?\d+)?)"
    last = max(map(int, rates))
    if cosine := re.fullmatch(rf"lr_cosine_T(\d+)_{number}_min{number}", name):
        last, peak = int(cosine[1]), float(cosine[2])
        course = {"lr_scheduler": WARMUP_PLATEAU_COSINE, "final_learning_rate": float(cosine[3])}
    elif multistep := re.fullmatch(rf"lr_multistep_ms([\d_]+)_g0\.5_{number}", name):
        peak = float(multistep[2])
        course = {"lr_scheduler": MULTISTEP, "lr_milestones": tuple(map(int, multistep[1].split("_")))}
    else:
        return float("inf")
    config = RunConfig(output_dir=Path(), max_train_steps=last, lr_warmup_steps=0, **course)
    schedule = learning_rate_schedule(config, peak)
    return max(abs(schedule(int(iteration) - 1) / rate - 1) for iteration, rate in rates.items())


def part(reference: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in reference.items() if name.startswith(prefix)}
