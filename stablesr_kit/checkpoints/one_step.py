"""One-step restorers from their released files and their Stable Diffusion: LoRAs merged, no tensor left over.

Facts of the released programs: PiSA-SR (Sun et al. 2025), OSEDiff (Wu et al. 2024), HYPIR (Lin et al. 2025) and InvSR
(Yue et al. 2025).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from stablesr_kit.checkpoints.assembling import AssemblyOptions, Network, Recipe, as_it_is, assemble
from stablesr_kit.checkpoints.base import BaseNetworks, build_base, canvas_options, measure_prediction, read_base
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, complain, left_over
from stablesr_kit.checkpoints.detecting import Family, Hints, detect, indices, shape
from stablesr_kit.checkpoints.networks import embed_prompt
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.noise_predictor import NoisePredictor

OPEN_RAIL = "Its base, Stable Diffusion 2.1: CreativeML Open RAIL++-M."

INVSR_PROMPT = (
    "Cinematic, high-contrast, photo-realistic, 8k, ultra HD, meticulous detailing, hyper sharpness, "
    "perfect without deformations"
)


@dataclass(frozen=True, kw_only=True)
class System:
    """What a restorer needs besides its weights.

    Attributes:
        licence: of code and weights, with its source.
        alpha: LoRAs are scaled by alpha / rank; None scales them by 1.
        prompt: the text it uses if none is given.
        config: arguments of `OneStepPipeline`.
    """

    licence: str
    alpha: float | None = None
    prompt: str = ""
    base: str = "Stable Diffusion 2.1 base (the 512 px model, which predicts epsilon)"
    config: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS: Mapping[str, System] = {
    "pisa-sr": System(
        licence=f"PiSA-SR (github.com/csslc/PiSA-SR): Apache-2.0 by its README. {OPEN_RAIL}",
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
        licence=f"OSEDiff (github.com/cswry/OSEDiff): Apache-2.0. {OPEN_RAIL}",
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
            f"code and weights. {OPEN_RAIL}"
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
            "Its base, SD-Turbo: Stability AI's own terms."
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
) -> dict[str, Any]:
    """Arguments of `OneStepPipeline`: stock networks with the LoRAs merged, and the settings of the released program.

    Args:
        checkpoint: pisa_sr.pkl, osediff.pkl, HYPIR_sd2.pth, noise_predictor_sd_turbo_v5.pth, or one of that kind of
            any rank and width.
        base: the Stable Diffusion it was made from, a diffusers folder or a checkpoint.
        hints: hyperparameters that shapes do not show, where they differ from the released models.
        tensors_only, ignore: as for `convert_checkpoint`.

    Raises:
        UnsafeCheckpointError: a file needs more than tensors.
        CheckpointError: a file is of another family, the base is not the one it belongs to, or a tensor is missing,
            left over or of another shape.
    """
    raw = read_checkpoint(checkpoint, tensors_only=tensors_only)
    file = canonicalize(raw)
    found = detect(file, hints)
    if found.family not in SYSTEMS:
        raise CheckpointError(
            f"{file.path.name} is {found.description}, not a one-step restorer; expected PiSA-SR, OSEDiff, HYPIR or "
            "InvSR"
        )
    complain(f"{file.path.name}: listed, but missing", sorted(_listed_loras(raw.content) - file.full_names().keys()))
    hints, options = hints or Hints(), AssemblyOptions(ignore=tuple(ignore))
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
        "default_prompt": _default_prompt(system.prompt, base),
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        **system.config,
        **canvas_options(unet, vae),
        "licence": system.licence,
    }


LISTS = re.compile(r"(?P<part>unet|vae)_lora_(?P<group>[a-z]+)_modules(?P<kind>_pix|_sem)?")
"""Where OSEDiff and PiSA-SR list the modules of each adapter."""

LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
"""peft's names of the two factors of a LoRA: scale * B @ A is added to a module's weight."""


def merged(
    kind: type[Network], network: Network, tensors: Mapping[str, Tensor], system: System, options: AssemblyOptions
) -> Network:
    """A network like the given one, in float32, with LoRAs added to its weights; all other tensors are shared.

    tensors: `<module>.lora_A.<adapter>.weight` and `.lora_B.`, and `<module>.base_layer.<weight or bias>` of a layer
        that was trained as a whole, which takes the place of the network's own.

    Raises `CheckpointError`, which names every tensor that has no place and every wrong shape.
    """
    weights = dict(network.state_dict())
    loras: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    unknown, wrong = [], []
    for name, tensor in tensors.items():
        lora = LORA.fullmatch(name)
        target = f"{lora['module']}.weight" if lora else name.replace(".base_layer.", ".")
        if target not in weights or target == name:
            unknown.append(name)
        elif lora:
            loras[target, lora["adapter"]][lora["side"]] = tensor.float()
        elif tensor.shape == weights[target].shape:
            weights[target] = tensor.float()
        else:
            wrong.append(f"{name} {tuple(tensor.shape)} for {tuple(weights[target].shape)}")
    named = f"{kind.__name__} of the base, which should be {system.base}"
    complain(f"not in the {named}", left_over(unknown, options.ignore))
    complain("one half of a LoRA is missing", [f"{key[0]} ({key[1]})" for key, lora in loras.items() if len(lora) < 2])
    for (target, _), sides in loras.items():
        down, up = sides["A"], sides["B"].flatten(1)  # (rank, in, ...), (out, rank)
        weight = weights[target]
        if down.shape[1:] != weight.shape[1:] or up.shape != (len(weight), len(down)):
            wrong.append(f"{target}: {tuple(up.shape)} @ {tuple(down.shape)} for {tuple(weight.shape)}")
        else:
            scale = 1.0 if system.alpha is None else system.alpha / len(down)
            weights[target] = weight + scale * (up @ down.flatten(1)).reshape(weight.shape)
    complain(f"other shapes than in the {named}", wrong)
    with init_empty_weights():
        built: Network = kind.from_config(network.config)  # type: ignore[attr-defined]
    built.load_state_dict(weights, strict=True, assign=True)
    return built.eval()


def noise_predictor(tensors: Mapping[str, Tensor], hints: Hints, options: AssemblyOptions) -> NoisePredictor:
    """InvSR's network from its names, which all begin with `encoder.`."""
    what = "InvSR's noise predictor"
    levels = 1 + max(indices(tensors, r"^encoder\.down_blocks\.(\d+)\."), default=-1)
    config: dict[str, Any] = {
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
    groups, head = config["norm_num_groups"], config["attention_head_dim"]
    if any(width % groups or width % head for width in config["block_out_channels"]):
        raise CheckpointError(
            f"{what} is {config['block_out_channels']} channels wide, which {groups} groups and attention heads of "
            f"{head} channels do not divide; give its own as hints (--config)"
        )
    return assemble(
        lambda: NoisePredictor(**config),
        lambda names: {name: Recipe((f"encoder.{name}",), as_it_is) for name in names},
        tensors,
        what=what,
        options=options,
    )


def noise_predictor_hints(path: Path) -> Hints:
    """Hyperparameters of InvSR's network that its weights do not show, from a JSON file with its arguments.

    Raises:
        CheckpointError: it is not such a file.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return Hints(
            noise_predictor_head_channels=int(config["attention_head_dim"]),
            noise_predictor_groups=int(config["norm_num_groups"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON file with attention_head_dim and norm_num_groups ({error})"
        ) from error


def scheduler_of_base(base: Path) -> DDPMScheduler:
    """The noise schedule of a base's folder; a checkpoint has that of Stable Diffusion."""
    if not base.is_dir():
        return DDPMScheduler.from_config(SpacedDDPMScheduler().config)
    try:
        return DDPMScheduler.from_pretrained(base, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base} cannot be read: {' '.join(str(error).split())}") from error


def _default_prompt(text: str, base: BaseNetworks) -> DefaultPrompt | None:
    encoder: CLIPTextModel | None = base.text_encoder
    if encoder is None or base.tokenizer is None:
        return None
    embeds = embed_prompt(text, encoder, base.tokenizer)
    prompt = DefaultPrompt(text, *embeds.shape[1:])
    prompt.load_state_dict({"embeds": embeds}, assign=True)
    return prompt


def _listed_loras(content: Mapping[str, object]) -> set[str]:
    """Full names of the tensors that a file of OSEDiff or PiSA-SR should have by its own lists of modules."""
    names = set()
    for key, modules in content.items():
        if (match := LISTS.fullmatch(key)) and isinstance(modules, list):
            adapter = f"default_{match['group']}{match['kind'] or ''}"
            names |= {f"{match['part']}.{module}.lora_{side}.{adapter}.weight" for module in modules for side in "AB"}
    return names


def _of_part(names: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}


def _split(names: Mapping[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Names that do not match the pattern, names that do)."""
    with_it = {name: tensor for name, tensor in names.items() if re.search(pattern, name)}
    return {name: tensor for name, tensor in names.items() if name not in with_it}, with_it
