"""The Stable Diffusion an adapter stands on: in the same checkpoint, in another one, or in a diffusers folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from stablesr_kit.checkpoints.assembling import Options
from stablesr_kit.checkpoints.canonical import Checkpoint
from stablesr_kit.checkpoints.detecting import Detection
from stablesr_kit.checkpoints.networks import build_text_encoder, build_unet, build_vae
from stablesr_kit.checkpoints.prediction import Prediction
from stablesr_kit.checkpoints.tokenizer import VOCABULARY_SIZE, clip_tokenizer
from stablesr_kit.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """The frozen networks."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | None
    text_encoder: CLIPTextModel | None
    tokenizer: Any | None
    prediction: Prediction | None
    """What the UNet predicts, where a config says so."""


def foundation_of_checkpoint(checkpoint: Checkpoint, detection: Detection, options: Options) -> Foundation:
    """From the sections of a StableSR or Stable Diffusion checkpoint that holds a UNet."""
    assert detection.unet is not None
    tokenizer = None
    if detection.text is not None and detection.text["vocab_size"] == VOCABULARY_SIZE:
        tokenizer = clip_tokenizer(
            pads_with_zero=detection.text["pad_token_id"] == 0, length=detection.text["max_position_embeddings"]
        )
    return Foundation(
        unet=build_unet(checkpoint, detection.unet, options),
        vae=build_vae(checkpoint, detection.vae, options) if detection.vae else None,
        text_encoder=build_text_encoder(checkpoint, detection.text, options) if detection.text else None,
        tokenizer=tokenizer,
        prediction=None,
    )


def foundation_of_folder(folder: Path, dtype: torch.dtype) -> Foundation:
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
    return Foundation(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prediction=Prediction(
            scheduler.get("prediction_type", "epsilon"), f"by the scheduler of {folder.name}", is_certain=True
        ),
    )
