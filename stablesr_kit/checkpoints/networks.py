"""Each network of a pipeline from the sections of a checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from stablesr_kit.checkpoints import key_maps, plans
from stablesr_kit.checkpoints.assembling import Network, Options, assemble
from stablesr_kit.checkpoints.canonical import Checkpoint
from stablesr_kit.checkpoints.detecting import Config
from stablesr_kit.checkpoints.key_maps import PREFIXES, TITLES, Modules, Section
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.steering import residual_blocks
from stablesr_kit.models.time_aware_encoder import StableSRAdapter


def build_unet(checkpoint: Checkpoint, config: Config, options: Options) -> UNet2DConditionModel:
    """The UNet without SPADE; its keys are those of the stock class."""
    return _renamed(UNet2DConditionModel, key_maps.unet_modules, checkpoint, "unet", config, options)


def build_vae(checkpoint: Checkpoint, config: Config, options: Options) -> AutoencoderKL:
    """The autoencoder without fusion layers."""
    return _renamed(AutoencoderKL, key_maps.vae_modules, checkpoint, "vae", config, options)


def build_cfw(checkpoint: Checkpoint, config: Config, options: Options) -> ControllableFeatureWrapping:
    """The fusion layers."""
    return _renamed(ControllableFeatureWrapping, key_maps.fusion_modules, checkpoint, "fusion", config, options)


def build_adapter(
    checkpoint: Checkpoint,
    config: Config,
    unet: UNet2DConditionModel,
    empty_prompt_embeds: Tensor | None,
    options: Options,
) -> StableSRAdapter:
    """Time-aware encoder and SFT layers, for the UNet they were trained with."""
    length = 0 if empty_prompt_embeds is None else empty_prompt_embeds.shape[1]
    blocks = residual_blocks(unet)
    full_config = config | {"sft_blocks": blocks}
    return assemble(
        lambda: StableSRAdapter.from_unet(unet, prompt_length=length, **config),
        lambda names: plans.adapter(names, full_config, dict(unet.config)),
        {
            PREFIXES[part] + name: tensor
            for part in ("encoder", "spade")
            for name, tensor in checkpoint.sections[part].items()
        },
        what="adapter",
        own={} if empty_prompt_embeds is None else {"empty_prompt_embeds": empty_prompt_embeds.to(options.dtype)},
        options=options,
    )


def build_text_encoder(checkpoint: Checkpoint, config: Config, options: Options) -> CLIPTextModel:
    """CLIP's text encoder up to the layer that Stable Diffusion reads."""
    text = checkpoint.sections["text"]
    is_open_clip = "model.ln_final.weight" in text
    if is_open_clip:
        unused = key_maps.OPEN_CLIP_LAST_LAYER.format(last=config["num_hidden_layers"])
        options = options._replace(ignore=(*options.ignore, unused))
    return assemble(
        lambda: CLIPTextModel(CLIPTextConfig(**config)),
        plans.open_clip_text if is_open_clip else lambda names: plans.clip_text(names, text),
        text,
        what="text encoder",
        prefix=PREFIXES["text"],
        options=options,
    )


@torch.no_grad()
def embed_empty_prompt(text_encoder: CLIPTextModel, tokenizer: Any | None = None) -> Tensor:
    """Embedding (1, tokens, channels) of the empty prompt: <start>, <end>, then padding to the full length.

    Without a tokenizer the padding is that of the text encoder's config: zeros for open_clip, else <end>.
    """
    config = text_encoder.config
    if tokenizer is None:
        tokens = torch.full((1, config.max_position_embeddings), config.pad_token_id)
        tokens[0, :2] = torch.tensor([config.bos_token_id, config.eos_token_id])
    else:
        length = tokenizer.model_max_length
        tokens = tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
    return text_encoder(tokens)[0]


def _renamed(
    network: Callable[..., Network],
    modules: Callable[[Config], Modules],
    checkpoint: Checkpoint,
    section: Section,
    config: Config,
    options: Options,
) -> Network:
    """A network each of whose tensors is one of theirs under another name."""
    return assemble(
        lambda: network(**config),
        lambda names: plans.renaming(names, modules(config)),
        checkpoint.sections[section],
        what=TITLES[section],
        prefix=PREFIXES[section],
        options=options,
    )
