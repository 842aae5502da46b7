"""The Stable Diffusion that an adapter belongs to: in the same checkpoint, in another one, or in a diffusers folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from stablesr_kit.checkpoints.assembling import AssemblyOptions
from stablesr_kit.checkpoints.canonical import Checkpoint, canonicalize, complain, left_over
from stablesr_kit.checkpoints.detecting import Detection, Hints, Prediction, detect
from stablesr_kit.checkpoints.networks import VOCABULARY_SIZE, build_text_encoder, build_unet, build_vae, clip_tokenizer
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.diffusion.spaced import SpacedDDPMScheduler
from stablesr_kit.errors import CheckpointError
from stablesr_kit.models.feature_wrapping import scale_factor

STABLE_DIFFUSION_WIDTHS = (320, 640, 1280, 1280)
MARGIN_PX = 32
"""Of converted models: four latents, and a quarter more work on the smallest canvas."""


@dataclass(frozen=True, kw_only=True)
class BaseNetworks:
    """The frozen networks of a Stable Diffusion."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | None
    text_encoder: CLIPTextModel | None
    tokenizer: Any | None
    prediction: Prediction | None
    """What the UNet predicts; None if no config says so."""


def read_base(base: str | Path, *, tensors_only: bool = False, use_ema: bool = False) -> Checkpoint | Path:
    """A Stable Diffusion checkpoint, or the path of a diffusers folder. Raises like `convert_checkpoint`."""
    if Path(base).is_dir():
        return Path(base)
    return canonicalize(read_checkpoint(base, tensors_only=tensors_only), use_ema=use_ema)


def build_base(base: Checkpoint | Path, hints: Hints, options: AssemblyOptions) -> BaseNetworks:
    """The frozen networks of the Stable Diffusion that is given as `base`."""
    if isinstance(base, Path):
        return base_of_folder(base, options.dtype)
    base_found = detect(base, hints)
    if base_found.unet is None or base_found.adapter is not None:
        raise CheckpointError(f"{base.path.name} is {base_found.description}, expected a Stable Diffusion as base")
    complain(f"{base.path.name}: not understood", left_over(base.sections.get("other", {}), options.ignore))
    return base_of_checkpoint(base, base_found, options)


def base_of_checkpoint(checkpoint: Checkpoint, detection: Detection, options: AssemblyOptions) -> BaseNetworks:
    """From the sections of a StableSR or Stable Diffusion checkpoint that holds a UNet."""
    assert detection.unet is not None
    tokenizer = None
    if detection.text is not None and detection.text["vocab_size"] == VOCABULARY_SIZE:
        tokenizer = clip_tokenizer(
            pads_with_zero=detection.text["pad_token_id"] == 0, length=detection.text["max_position_embeddings"]
        )
    return BaseNetworks(
        unet=build_unet(checkpoint, detection.unet, options),
        vae=build_vae(checkpoint, detection.vae, options) if detection.vae else None,
        text_encoder=build_text_encoder(checkpoint, detection.text, options) if detection.text else None,
        tokenizer=tokenizer,
        prediction=None,
    )


def base_of_folder(folder: Path, dtype: torch.dtype) -> BaseNetworks:
    """From a Stable Diffusion pipeline in diffusers' layout; nothing is fetched."""
    parts = {part.name for part in folder.glob("*") if part.is_dir()}
    lacking = {"unet", "vae", "scheduler"} - parts
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {', '.join(sorted(lacking))}; expected a Stable Diffusion 1 or 2 folder of diffusers"
        )
    try:
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True, dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True, dtype=dtype)
        text_encoder = tokenizer = None
        if {"text_encoder", "tokenizer"} <= parts:
            text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error
    return BaseNetworks(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prediction=Prediction(
            scheduler.get("prediction_type", "epsilon"), f"by the scheduler of {folder.name}", is_certain=True
        ),
    )


def canvas_options(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, int]:
    """Options of a pipeline for the canvas of a full-size Stable Diffusion UNet; none for other UNets."""
    if tuple(unet.config.block_out_channels) != STABLE_DIFFUSION_WIDTHS:
        return {}
    return {"min_size_px": unet.config.sample_size * scale_factor(vae), "margin_px": MARGIN_PX, "working_scale": 1}


@torch.no_grad()
def measure_prediction(unet: UNet2DConditionModel) -> Prediction | None:
    """What the UNet predicts, measured with pure noise; None if its weights are untrained.

    At the last timestep x is all noise: an epsilon model returns it, a velocity model returns the picture it expects,
    with hardly any of x. At an early timestep both know noise when they see it, since v = sqrt(a) eps - sqrt(1 - a) x0
    (Salimans and Ho 2022, app. D); an untrained network does not.
    """
    alphas_cumprod = SpacedDDPMScheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, unet.config.in_channels, 16, 16, generator=generator)
    context = torch.zeros(4, 77, unet.config.cross_attention_dim, dtype=unet.dtype)

    def response(timestep: int) -> tuple[float, float]:
        """(regression coefficient, correlation) of the output with the noise, where nothing but noise is in x."""
        x = (1 - alphas_cumprod[timestep]).sqrt() * noise
        output = unet(x.to(unet.dtype), timestep, context).sample.float().flatten()
        both = torch.stack([output, noise.flatten()])
        return (both.prod(dim=0).sum() / noise.square().sum()).item(), torch.corrcoef(both)[0, 1].item()

    last, _ = response(999)
    if last > 0.8:
        return Prediction("epsilon", "measured: the UNet returns pure noise as it is", True)
    _, early = response(200)
    if abs(last) < 0.4 and early > 0.4:
        return Prediction("v_prediction", "measured: the UNet makes a picture of pure noise", True)
    return None
