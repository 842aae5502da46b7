"""Turn checkpoints of other programs into the components of a pipeline."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stablesr_kit.checkpoints.assembling import AssemblyOptions
from stablesr_kit.checkpoints.base import (
    BaseNetworks,
    base_of_checkpoint,
    build_base,
    canvas_options,
    measure_prediction,
    read_base,
)
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, complain, left_over, section
from stablesr_kit.checkpoints.detecting import (
    ASSUMED,
    ONE_STEP,
    Detection,
    Hints,
    Prediction,
    PredictionType,
    detect,
    prediction_from_name,
)
from stablesr_kit.checkpoints.key_maps import PREFIXES
from stablesr_kit.checkpoints.networks import build_adapter, build_cfw, build_vae, embed_empty_prompt
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping

logger = logging.getLogger(__name__)

SLOTS: Mapping[str, str] = {
    "stablesr": "give it as the checkpoint",
    "stablesr extract": "give it as the checkpoint, and its Stable Diffusion as base (--base)",
    "cfw": "give it as cfw (--cfw)",
    "stable diffusion": "give it as base (--base) of a web-UI extract",
    "autoencoder": "StableSR takes its own; for w above 0 give vqgan_cfw_00011.ckpt as cfw (--cfw)",
    "diffusers weights": "give the pipeline folder they belong to as base (--base)",
    **dict.fromkeys(ONE_STEP, "give it alone, and its Stable Diffusion as base (--base)"),
    "lora": "load it with pipeline.load_lora_weights",
    **dict.fromkeys(("codeformer", "vqgan", "vqgan discriminator"), "give it as --codeformer"),
}
"""What to do with a checkpoint that was given for the wrong argument."""


def convert_checkpoint(
    checkpoint: str | Path,
    *,
    cfw: str | Path | None = None,
    base: str | Path | None = None,
    prediction_type: PredictionType | None = None,
    hints: Hints | None = None,
    use_ema: bool = False,
    tensors_only: bool = False,
    ignore: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Components of a pipeline, by the names of StableSRPipeline's arguments; absent ones are None.

    Where format and `dtype` allow, weights stay mapped from the file, without a second copy in memory.

    Args:
        checkpoint: a complete StableSR checkpoint, or a web-UI extract.
        cfw: a checkpoint with the fusion layers of CFW. Without it the pipeline takes w = 0 only.
        base: for an extract, the Stable Diffusion it belongs to: a checkpoint or a diffusers folder.
        prediction_type: what the UNet predicts. None finds out, from the base's scheduler config, the behaviour of the
            UNet and the file name, in this order; if all fail, epsilon is assumed, with a warning.
        hints: hyperparameters that shapes do not show, where they differ from the released models.
        use_ema: take the moving averages (EMA) of the UNet's weights, where the file has both.
        tensors_only: read a pickle although it names unknown objects; they are replaced, and nothing is run.
        ignore: regular expressions of official names that may be left over, in addition to the known ones.

    Raises:
        UnsafeCheckpointError: a file needs more than tensors.
        CheckpointError: a file is of another family, or a tensor is missing, left over or of another shape.
    """
    main = canonicalize(read_checkpoint(checkpoint, tensors_only=tensors_only), use_ema=use_ema)
    cfw_file = canonicalize(read_checkpoint(cfw, tensors_only=tensors_only)) if cfw else None
    return convert(
        main,
        cfw=cfw_file,
        base=read_base(base, tensors_only=tensors_only, use_ema=use_ema) if base else None,
        prediction_type=prediction_type,
        hints=hints,
        ignore=ignore,
        dtype=dtype,
    )


def load_official(
    config: Mapping[str, Any],
    *,
    unet: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    cfw: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Components, as `convert_checkpoint`, from the state dicts of the official modules and their configs.

    config: constructor arguments under "unet" and "enc", and "parameterization". The autoencoder is that of `cfw`.
    """
    unsupported = [
        name
        for part in ("unet", "enc")
        for name in ("use_new_attention_order", "use_scale_shift_norm", "resblock_updown")
        if config[part].get(name)
    ]
    if config["enc"].get("num_head_channels", -1) > 0:
        unsupported.append("num_head_channels of the time-aware encoder")
    complain("not supported", unsupported)
    tensors = {PREFIXES["unet"] + name: tensor for name, tensor in unet.items()}
    tensors |= {PREFIXES["encoder"] + name: tensor for name, tensor in encoder.items()}
    head_channels = config["unet"].get("num_head_channels", -1)
    encoder_heads = config["enc"].get("num_heads", -1)
    return convert(
        section(Path("official modules"), tensors),
        cfw=section(Path("official autoencoder"), cfw),
        prediction_type="v_prediction" if config["parameterization"] == "v" else "epsilon",
        hints=Hints(
            unet_head_channels=head_channels if head_channels > 0 else None,
            unet_heads=config["unet"].get("num_heads") if head_channels <= 0 else None,
            encoder_heads=encoder_heads if encoder_heads > 0 else None,
        ),
    )


def convert(
    main: Checkpoint,
    *,
    cfw: Checkpoint | None = None,
    base: Checkpoint | Path | None = None,
    prediction_type: PredictionType | None = None,
    hints: Hints | None = None,
    ignore: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """As `convert_checkpoint`, from files already read."""
    hints = hints or Hints()
    if hints.latent_size is None and "768" in main.path.name:
        hints = replace(hints, latent_size=96)
    options = AssemblyOptions(dtype, tuple(ignore))
    found = detect(main, hints)
    if found.adapter is None:
        raise CheckpointError(f"{main.path.name} is {found.description}, not StableSR; {_slot(found)}")
    networks = _base_networks(main, found, base, hints, options)
    prediction = _prediction(prediction_type, networks, [main, *([base] if isinstance(base, Checkpoint) else [])])
    embeds = None
    if networks.text_encoder is not None:
        embeds = embed_empty_prompt(networks.text_encoder, networks.tokenizer)
    fusion, vae = _fusion_and_vae(main, found, cfw, networks.vae, hints, options)
    complain(f"{main.path.name}: not understood", left_over(main.sections.get("other", {}), options.ignore))
    return {
        "vae": vae,
        "unet": networks.unet,
        "adapter": build_adapter(main, found.adapter, networks.unet, embeds, options),
        "scheduler": SpacedDDPMScheduler(prediction_type=prediction.type),
        "cfw": fusion,
        "text_encoder": networks.text_encoder,
        "tokenizer": networks.tokenizer,
        "default_steps": 4 if "turbo" in main.path.name else 200,  # what the authors use
        **canvas_options(networks.unet, vae),
    }


def _slot(found: Detection) -> str:
    return SLOTS.get(found.family, "expected stablesr_000117.ckpt, one of its relatives, or a web-UI extract of them")


def _base_networks(
    main: Checkpoint, found: Detection, base: Checkpoint | Path | None, hints: Hints, options: AssemblyOptions
) -> BaseNetworks:
    """The frozen networks that the adapter of `main` steers."""
    if found.unet is not None:
        if base is not None:
            raise CheckpointError(f"{main.path.name} holds its own Stable Diffusion; leave base (--base) out")
        return base_of_checkpoint(main, found, options)
    if base is None:
        raise CheckpointError(
            f"{main.path.name} is {found.description}: it holds the adapter alone; give the Stable Diffusion 2.1 it "
            "belongs to as base (--base), a checkpoint or a diffusers folder"
        )
    return build_base(base, hints, options)


def _prediction(given: PredictionType | None, networks: BaseNetworks, files: list[Checkpoint]) -> Prediction:
    """What the UNet predicts, by the strongest evidence; contradictions are reported."""
    if given is not None:
        return Prediction(given, "given", is_certain=True)
    by_name = next(filter(None, (prediction_from_name(file.path.name) for file in files)), None)
    if networks.prediction is not None:
        if by_name is not None and by_name.type != networks.prediction.type:
            raise CheckpointError(
                f"the checkpoint is for a {by_name.type} model {by_name.source}, but the base predicts "
                f"{networks.prediction.type} {networks.prediction.source}; give the base it belongs to, or "
                "prediction_type (--prediction-type)"
            )
        return networks.prediction
    measured = measure_prediction(networks.unet)
    if measured is not None and by_name is not None and measured.type != by_name.type:
        logger.warning("%s says %s, but the UNet is %s", files[0].path.name, by_name.type, measured)
    prediction = measured or by_name or ASSUMED
    logger.log(logging.INFO if prediction.is_certain else logging.WARNING, "prediction type: %s", prediction)
    return prediction


def _fusion_and_vae(
    main: Checkpoint,
    found: Detection,
    cfw: Checkpoint | None,
    vae: AutoencoderKL | None,
    hints: Hints,
    options: AssemblyOptions,
) -> tuple[ControllableFeatureWrapping | None, AutoencoderKL]:
    """The fusion layers, and the autoencoder to use with them."""
    if cfw is None:
        if vae is None:
            raise CheckpointError(f"{main.path.name} has no autoencoder; give vqgan_cfw_00011.ckpt as cfw (--cfw)")
        return (build_cfw(main, found.cfw, options) if found.cfw else None), vae
    cfw_found = detect(cfw, hints)
    if cfw_found.family != "cfw" or cfw_found.cfw is None:
        raise CheckpointError(f"{cfw.path.name} is {cfw_found.description}, not CFW; {_slot(cfw_found)}")
    if found.cfw is not None:
        raise CheckpointError(f"{main.path.name} holds its own CFW; leave cfw (--cfw) out")
    complain(f"{cfw.path.name}: not understood", left_over(cfw.sections.get("other", {}), options.ignore))
    fusion = build_cfw(cfw, cfw_found.cfw, options)
    if cfw_found.vae is not None:
        own_vae = build_vae(cfw, cfw_found.vae, options)
        if vae is not None:
            _compare(vae, own_vae, cfw.path.name)
        vae = own_vae
    if vae is None:
        raise CheckpointError(f"neither {main.path.name} nor {cfw.path.name} has an autoencoder")
    return fusion, vae


def _compare(vae: AutoencoderKL, cfw_vae: AutoencoderKL, cfw_name: str) -> None:
    """Warn if the autoencoder that CFW was trained with is not the checkpoint's.

    Differences below half precision do not count: files are published in both precisions.
    """
    ours, theirs = vae.state_dict(), cfw_vae.state_dict()
    other = [name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape]
    complain(f"{cfw_name} belongs to an autoencoder of other shapes", other)
    off = {name: (ours[name].float() - theirs[name].float()).abs().max().item() for name in ours}
    differing = [name for name, gap in off.items() if gap > 2e-3 * ours[name].abs().max().item()]
    if differing:
        worst = max(differing, key=lambda name: off[name])
        logger.warning(
            "the autoencoder in %s differs from that of the checkpoint in %d of %d tensors (most in %s, by %.3g); "
            "the one CFW was trained with is used",
            cfw_name, len(differing), len(off), worst, off[worst],
        )  # fmt: skip
