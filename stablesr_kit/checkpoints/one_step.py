"""One-step restorers from their released files and the Stable Diffusion they stand on: LoRAs merged, nothing left over.

Facts of the released programs: PiSA-SR (Sun et al. 2025), OSEDiff (Wu et al. 2024), HYPIR (Lin et al. 2025) and InvSR
(Yue et al. 2025).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from stablesr_kit.checkpoints.assembling import AssemblyOptions, Network, Recipe, as_it_is, assemble
from stablesr_kit.checkpoints.base import BaseNetworks, build_base, measure_prediction, read_base, trained_size_px
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, complain, left_over
from stablesr_kit.checkpoints.detecting import Family, Hints, detect, indices, shape
from stablesr_kit.checkpoints.networks import embed_prompt
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.noise_predictor import NoisePredictor

INVSR_PROMPT = (
    "Cinematic, high-contrast, photo-realistic, 8k, ultra HD, meticulous detailing, hyper sharpness, "
    "perfect without deformations"
)


@dataclass(frozen=True, kw_only=True)
class System:
    """What a restorer is beside its weights.

    Attributes:
        licence: of code and weights, with its source.
        alpha: of the LoRAs, which count alpha / rank; None counts them once, whatever the rank.
        prompt: the text it is used with where none is given.
        config: of `OneStepPipeline`.
    """

    licence: str
    alpha: float | None = None
    prompt: str = ""
    base: str = "Stable Diffusion 2.1 base (the 512 px model, which predicts epsilon)"
    config: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS: Mapping[Family, System] = {
    "pisa-sr": System(
        licence="PiSA-SR (github.com/csslc/PiSA-SR): Apache-2.0 by its README.",
        alpha=8.0,
        config={
            "prediction": "residual",
            "timesteps": [[1]],
            "tile_px": 768,
            "overlap_px": 256,
            "default_color_fix": "adain",
        },
    ),
    "osediff": System(
        licence="OSEDiff (github.com/cswry/OSEDiff): Apache-2.0.",
        alpha=8.0,
        config={
            "prediction": "epsilon",
            "timesteps": [[999]],
            "tile_px": 768,
            "overlap_px": 256,
            "default_color_fix": "adain",
            "tags_format": "{tags}, {prompt},",
        },
    ),
    "hypir": System(
        licence=(
            "HYPIR (github.com/XPixelGroup/HYPIR): SupPixel's terms; for research and other non-commercial use only, "
            "code and weights."
        ),
        config={
            "prediction": "epsilon",
            "timesteps": [[200]],
            "tile_px": 512,
            "overlap_px": 256,
            "default_color_fix": "wavelet",
        },
    ),
    "invsr": System(
        licence=(
            "InvSR (github.com/zsyOAOA/InvSR): S-Lab License 1.0; for non-commercial use only, code and weights. "
            "SD-Turbo, which it stands on, has Stability AI's own terms."
        ),
        prompt=INVSR_PROMPT,
        base="SD-Turbo",
        config={
            "prediction": "epsilon",
            # The released program takes one from each of its nominal timesteps (200, 100, ...).
            "timesteps": [[199], [199, 99], [199, 99, 49], [199, 149, 99, 49], [249, 199, 149, 99, 49]],
            "tile_px": 512,
            "overlap_px": 256,
            "default_color_fix": "none",
        },
    ),
}
"""The restorers that can be converted, by the family that `detect` gives their files."""


def convert_one_step(
    checkpoint: str | Path,
    base: str | Path,
    *,
    hints: Hints | None = None,
    tensors_only: bool = False,
    ignore: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of `OneStepPipeline`: stock networks with the LoRAs merged, and what the released program sets.

    Args:
        checkpoint: pisa_sr.pkl, osediff.pkl, HYPIR_sd2.pth, noise_predictor_sd_turbo_v5.pth, or one of that kind of
            any rank and width.
        base: the Stable Diffusion it stands on, a diffusers folder or a checkpoint.
        hints: what shapes do not tell, where it differs from the released models.
        tensors_only, ignore, dtype: as for `convert_checkpoint`.

    Raises:
        UnsafeCheckpointError: a file needs more than tensors.
        CheckpointError: a file is of another family, the base is not the one it belongs to, or a tensor is missing,
            left over or of another shape.
    """
    file = canonicalize(read_checkpoint(checkpoint, tensors_only=tensors_only))
    options = AssemblyOptions(dtype, tuple(ignore))
    found = detect(file, hints)
    if found.family not in SYSTEMS:
        raise CheckpointError(
            f"{file.path.name} is {found.description}, not a one-step restorer; expected PiSA-SR, OSEDiff, HYPIR or "
            "InvSR"
        )
    hints = hints or Hints()
    networks = build_base(read_base(base, tensors_only=tensors_only), hints, options)
    return join(file, found.family, networks, scheduler_of_base(Path(base)), hints, options)


def join(
    file: Checkpoint,
    family: Family,
    base: BaseNetworks,
    scheduler: DDPMScheduler,
    hints: Hints,
    options: AssemblyOptions,
) -> dict[str, Any]:
    """As `convert_one_step`, from a file and a base already read."""
    system = SYSTEMS[family]
    if base.vae is None:
        raise CheckpointError(f"the base has no autoencoder; expected {system.base}")
    prediction = base.prediction or measure_prediction(base.unet)
    if prediction is not None and prediction.type != "epsilon":
        raise CheckpointError(f"the base predicts {prediction.type}, {prediction.source}; expected {system.base}")
    unet, vae = base.unet, base.vae
    networks: dict[str, Any] = {"unet": unet, "vae": vae}
    names = file.full_names()
    if family == "invsr":
        networks["noise_predictor"] = noise_predictor(names, hints, options)
    elif family == "hypir":
        networks["unet"] = merged(UNet2DConditionModel, unet, names, system, options)
    else:
        of_unet, of_vae = _of_part(names, "unet."), _of_part(names, "vae.")
        if family == "pisa-sr":
            pix, sem = _split(of_unet, r"\.default_\w+_sem\.weight$")
            networks["unet_pix"] = merged(UNet2DConditionModel, unet, pix, system, options)
            networks["unet"] = merged(UNet2DConditionModel, networks["unet_pix"], sem, system, options)
        else:
            networks["unet"] = merged(UNet2DConditionModel, unet, of_unet, system, options)
        if of_vae:
            networks["vae"] = merged(AutoencoderKL, vae, of_vae, system, options)
    return {
        **networks,
        "scheduler": scheduler,
        "default_prompt": _default_prompt(system.prompt, base, options),
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        **system.config,
        "min_size_px": trained_size_px(unet, vae),
        "licence": system.licence,
    }


class LoRA(NamedTuple):
    """What is added to the weight of one module: `up` @ `down`, times a scale."""

    down: Tensor
    """(rank, in) of a linear layer, (rank, in, kernel, kernel) of a convolution."""
    up: Tensor
    """(out, rank), of a convolution (out, rank, 1, 1)."""

    def delta(self, alpha: float | None) -> Tensor:
        """In float32, (out, in) or (out, in, kernel, kernel)."""
        rank = self.down.shape[0]
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.mul_(1.0 if alpha is None else alpha / rank).reshape(len(self.up), *self.down.shape[1:])


def merged(
    kind: type[Network], network: Network, tensors: Mapping[str, Tensor], system: System, options: AssemblyOptions
) -> Network:
    """The network with LoRAs added to its weights, in float32, rounded once; the given one stays as it is.

    tensors: `<module>.lora_A.<adapter>.weight` and `.lora_B.`, and `<module>.base_layer.<weight or bias>` of a layer
        that was trained as a whole, which takes the place of the network's own.

    Raises `CheckpointError`, which names every tensor that has no place and every wrong shape.
    """
    what = kind.__name__
    weights = dict(network.state_dict())
    ups, downs = {}, {}
    unknown, wrong = [], []
    for name, tensor in tensors.items():
        if lora := re.fullmatch(r"(.+)\.lora_([AB])\.([^.]+)\.weight", name):
            target = f"{lora[1]}.weight"
            (downs if lora[2] == "A" else ups)[target, lora[3]] = tensor
        else:
            target = name.replace(".base_layer.", ".")
            if target != name and target in weights and weights[target].shape == tensor.shape:
                weights[target] = tensor.to(options.dtype)
            elif target in weights:
                wrong.append(f"{name} {tuple(tensor.shape)} for {tuple(weights[target].shape)}")
        if target not in weights:
            unknown.append(name)
    complain(f"{what}: not in the base, which should be {system.base}", left_over(unknown, options.ignore))
    halves = [f"{target} ({adapter})" for target, adapter in ups.keys() ^ downs.keys()]
    complain(f"{what}: one half of a LoRA is missing for", sorted(halves))
    loras: dict[str, list[LoRA]] = defaultdict(list)
    for key, down in downs.items():
        lora, expected = LoRA(down, ups[key]), weights[key[0]].shape
        if down.shape[1:] != expected[1:] or lora.up.flatten(1).shape != (expected[0], len(down)):
            wrong.append(f"{key[0]}: {tuple(lora.up.shape)} @ {tuple(down.shape)} for {tuple(expected)}")
        loras[key[0]].append(lora)
    complain(f"{what}: other shapes than the base has, which should be {system.base}", wrong)
    for target, several in loras.items():
        weight = weights[target].float()
        for lora in several:
            weight = weight + lora.delta(system.alpha)
        weights[target] = weight.to(options.dtype)
    with init_empty_weights():
        built = kind.from_config(network.config)
    built.load_state_dict(weights, strict=True, assign=True)
    return built.eval()


def noise_predictor(tensors: Mapping[str, Tensor], hints: Hints, options: AssemblyOptions) -> NoisePredictor:
    """InvSR's network from its names, which all begin with `encoder.`."""
    what = "InvSR's noise predictor"
    levels = 1 + max(indices(tensors, r"^encoder\.down_blocks\.(\d+)\."), default=-1)
    config = {
        "in_channels": shape(tensors, "encoder.conv_in.weight", what)[1],
        "latent_channels": shape(tensors, "encoder.conv_out.weight", what)[0] // 2,
        "block_out_channels": tuple(
            shape(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", what)[0] for i in range(levels)
        ),
        "layers_per_block": 1 + max(indices(tensors, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\."), default=-1),
        "attention_head_dim": hints.noise_predictor_head_channels or 64,
        "norm_num_groups": hints.noise_predictor_groups or 32,
        "temb_channels": shape(tensors, "encoder.time_embedding.linear_1.weight", what)[0],
    }
    return assemble(
        lambda: NoisePredictor(**config),
        lambda names: {name: Recipe((f"encoder.{name}",), as_it_is) for name in names},
        tensors,
        what=what,
        options=options,
    )


def scheduler_of_base(base: Path) -> DDPMScheduler:
    """The noise schedule of a base's folder; a checkpoint has that of Stable Diffusion."""
    if not base.is_dir():
        return DDPMScheduler.from_config(SpacedDDPMScheduler().config)
    try:
        return DDPMScheduler.from_pretrained(base, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base} cannot be read: {' '.join(str(error).split())}") from error


def _default_prompt(text: str, base: BaseNetworks, options: AssemblyOptions) -> DefaultPrompt | None:
    encoder: CLIPTextModel | None = base.text_encoder
    if encoder is None or base.tokenizer is None:
        return None
    embeds = embed_prompt(text, encoder, base.tokenizer)
    prompt = DefaultPrompt(text, *embeds.shape[1:])
    prompt.load_state_dict({"embeds": embeds.to(options.dtype)}, assign=True)
    return prompt


def _of_part(names: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}


def _split(names: Mapping[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(those without the pattern, those with it)."""
    with_it = {name: tensor for name, tensor in names.items() if re.search(pattern, name)}
    return {name: tensor for name, tensor in names.items() if name not in with_it}, with_it
