"""The training side of CodeFormer against `training.safetensors` and `training.json`."""

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablesr_kit.checkpoints.codeformer import load_official_faces
from stablesr_kit.errors import CheckpointError, reason_of
from stablesr_kit.imaging.degradations.filtering import gaussian_kernel
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.vqgan import GumbelQuantizer, Quantized
from stablesr_kit.training.losses.pictures import HINGE
from stablesr_kit.training.run.config import MULTISTEP, WARMUP_PLATEAU_COSINE, RunConfig
from stablesr_kit.training.run.optimizers import learning_rate_schedule
from tests.parity.codeformer_degradation import KERNEL_TOLERANCE, check_degradations
from tests.parity.references import (
    MissingInput,
    Ours,
    Quantity,
    Reference,
    checked,
    compare,
    read_json,
    read_tensors,
)

TOLERANCE = 1e-5
SCHEDULE_TOLERANCE = 1e-9
OFFICIAL_KL_WEIGHT = 5e-4
DEGRADATIONS = ("kernel.mixed", "deg.", "brush.")


def check_training(folder: Path) -> Iterator[Quantity]:
    """Each quantity of both files; infinity for one that is not understood."""
    tensors, stated = folder / "training.safetensors", folder / "training.json"
    reference = read_tensors(tensors) if tensors.exists() else Reference[Tensor]()
    facts = read_json(stated) if stated.exists() else Reference[Any]()
    ours = kernels(reference) | discriminator(reference) | gumbel(reference)
    inputs = {"gt_bgr_u8", "disc.in", "gumbel.in"}
    expected = {
        key: tensor
        for key, tensor in reference.items()
        if key not in inputs and ".w." not in key and not key.startswith(DEGRADATIONS)
    }
    yield from compare("training", expected, ours, lambda key, _: KERNEL_TOLERANCE if "kernel." in key else TOLERANCE)
    yield from check_degradations(reference, facts)
    if "hinge" in facts:
        yield from hinge(reference, Reference(facts["hinge"]))
    for key in sorted(key for key in facts if key.startswith("lr_")):
        yield f"training.{key}", relative_to_schedule(key, facts[key]), SCHEDULE_TOLERANCE


def kernels(reference: Reference[Tensor]) -> Ours:
    """The kernels whose sigmas and angle are in their names."""
    ours: Ours = {}
    for key, kernel in reference.items():
        shape = key.removeprefix("kernel.").split("_")
        if key.startswith("kernel.iso_"):
            ours[key] = partial(gaussian_kernel, len(kernel), float(shape[1]), float(shape[1]))
        if key.startswith("kernel.aniso_"):
            ours[key] = partial(gaussian_kernel, len(kernel), *map(float, shape[1:]))
    return ours


def discriminator(reference: Reference[Tensor]) -> Ours:
    """Logits in eval and train mode, and what one pass in train mode does to the running means."""

    def network() -> VQGANDiscriminator:
        try:
            built = load_official_faces(part(reference, "disc.w."))
        except CheckpointError as error:
            raise MissingInput(f"a tensor of disc.w ({reason_of(error)})") from error
        assert isinstance(built, VQGANDiscriminator)
        return built

    @cache
    def in_train_mode() -> tuple[Tensor, Tensor]:
        trained = network().train()
        return trained(reference["disc.in"]), trained.layers[3].running_mean

    return {
        "disc.out_eval": lambda: network()(reference["disc.in"]),
        "disc.out_train_mode": lambda: in_train_mode()[0],
        "disc.running_mean_after": lambda: in_train_mode()[1],
    }


def gumbel(reference: Reference[Tensor]) -> Ours:
    """The Gumbel quantiser in eval mode, with torch's generator at 0."""

    @cache
    def quantized() -> Quantized:
        weights = Reference(
            {
                name.replace("embed.", "codebook.").replace("proj.", "projection."): tensor
                for name, tensor in part(reference, "gumbel.w.").items()
            }
        )
        codes, channels = weights["codebook.weight"].shape
        quantizer = GumbelQuantizer(codes, channels, kl_weight=OFFICIAL_KL_WEIGHT, straight_through=False).eval()
        quantizer.load_state_dict({name: weights[name] for name in quantizer.state_dict()})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return quantizer(reference["gumbel.in"])

    return {
        "gumbel.out_seed0": lambda: quantized().features,
        "gumbel.indices_seed0": lambda: quantized().indices,
        "gumbel.diff": lambda: quantized().loss.view(1),
    }


def hinge(reference: Reference[Tensor], facts: Reference[Any]) -> Iterator[Quantity]:
    """The hinge losses on the logits that are named as their input, taken as real and as fake ones."""

    def of_discriminator() -> float:
        logits = reference[facts["on"]]
        both = HINGE.real(logits).item() + HINGE.fake(logits).item()
        return abs(both - facts["d_real"] - facts["d_fake"]) / 2

    def of_generator() -> float:
        return abs(HINGE.generator(reference[facts["on"]]).item() - facts["g"])

    yield from checked("training.hinge.d", of_discriminator, TOLERANCE)
    yield from checked("training.hinge.g", of_generator, TOLERANCE)


def relative_to_schedule(name: str, rates: dict[str, float]) -> float:
    """Largest relative difference of the rates at the iterations, the first being 1; infinity for another name."""
    number = r"([\d.]+(?:e-?\d+)?)"
    last = max(map(int, rates))
    if cosine := re.fullmatch(rf"lr_cosine_T(\d+)_{number}_min{number}", name):
        last, peak = int(cosine[1]), float(cosine[2])
        config = RunConfig(
            output_dir=".",
            max_train_steps=last,
            lr_warmup_steps=0,
            lr_scheduler=WARMUP_PLATEAU_COSINE,
            final_learning_rate=float(cosine[3]),
        )
    elif multistep := re.fullmatch(rf"lr_multistep_ms([\d_]+)_g0\.5_{number}", name):
        peak = float(multistep[2])
        config = RunConfig(
            output_dir=".",
            max_train_steps=last,
            lr_warmup_steps=0,
            lr_scheduler=MULTISTEP,
            lr_milestones=tuple(map(int, multistep[1].split("_"))),
        )
    else:
        return float("inf")
    schedule = learning_rate_schedule(config, peak)
    return max(abs(schedule(int(iteration) - 1) / rate - 1) for iteration, rate in rates.items())


def part(reference: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in reference.items() if name.startswith(prefix)}
