"""Each network of a pipeline from the sections of a checkpoint, and networks of other projects by spandrel."""

import gzip
import itertools
import logging
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stablesr_kit.checkpoints import key_maps
from stablesr_kit.checkpoints.assembling import (
    AssemblyOptions,
    Network,
    adapter_recipes,
    assemble,
    clip_recipes,
    open_clip_recipes,
    renamed_recipes,
)
from stablesr_kit.checkpoints.canonical import Checkpoint
from stablesr_kit.checkpoints.detecting import Config
from stablesr_kit.checkpoints.key_maps import PREFIXES, TITLES, Modules, Section
from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.steering import residual_blocks
from stablesr_kit.models.time_aware_encoder import StableSRAdapter

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

logger = logging.getLogger(__name__)

VOCABULARY = "assets/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408


def build_unet(checkpoint: Checkpoint, config: Config, options: AssemblyOptions) -> UNet2DConditionModel:
    """The UNet without SPADE; its keys are those of the stock class."""
    return _renamed(UNet2DConditionModel, key_maps.unet_modules, checkpoint, "unet", config, options)


def build_vae(checkpoint: Checkpoint, config: Config, options: AssemblyOptions) -> AutoencoderKL:
    """The autoencoder without fusion layers."""
    return _renamed(AutoencoderKL, key_maps.vae_modules, checkpoint, "vae", config, options)


def build_cfw(checkpoint: Checkpoint, config: Config, options: AssemblyOptions) -> ControllableFeatureWrapping:
    """The fusion layers."""
    return _renamed(ControllableFeatureWrapping, key_maps.fusion_modules, checkpoint, "fusion", config, options)


def build_adapter(
    checkpoint: Checkpoint,
    config: Config,
    unet: UNet2DConditionModel,
    empty_prompt_embeds: Tensor | None,
    options: AssemblyOptions,
) -> StableSRAdapter:
    """Time-aware encoder and SFT layers, for the UNet they were trained with."""
    length = 0 if empty_prompt_embeds is None else empty_prompt_embeds.shape[1]
    blocks = residual_blocks(unet)
    full_config = config | {"sft_blocks": blocks}
    return assemble(
        lambda: StableSRAdapter.from_unet(unet, prompt_length=length, **config),
        lambda names: adapter_recipes(names, full_config, dict(unet.config)),
        {
            PREFIXES[part] + name: tensor
            for part in ("encoder", "spade")
            for name, tensor in checkpoint.sections[part].items()
        },
        what="adapter",
        own={} if empty_prompt_embeds is None else {"empty_prompt_embeds": empty_prompt_embeds.to(options.dtype)},
        options=options,
    )


def build_text_encoder(checkpoint: Checkpoint, config: Config, options: AssemblyOptions) -> CLIPTextModel:
    """CLIP's text encoder up to the layer that Stable Diffusion reads."""
    text = checkpoint.sections["text"]
    is_open_clip = "model.ln_final.weight" in text
    if is_open_clip:
        last = f"model.transformer.resblocks.{config['num_hidden_layers']}."
        logger.info("left out: %s%s*: Stable Diffusion 2 reads the output of the layer before", PREFIXES["text"], last)
        text = {name: tensor for name, tensor in text.items() if not name.startswith(last)}
    return assemble(
        lambda: CLIPTextModel(CLIPTextConfig(**config)),
        open_clip_recipes if is_open_clip else lambda names: clip_recipes(names, text),
        text,
        what="text encoder",
        prefix=PREFIXES["text"],
        options=options,
    )


def clip_tokenizer(*, pads_with_zero: bool, length: int) -> CLIPTokenizer:
    """Tokenizer of every CLIP text encoder with 49408 tokens.

    Args:
        pads_with_zero: pad with token 0, which is "!", as open_clip and Stable Diffusion 2 do (a "!" in a prompt is the
            same token, as with their published tokenizers); else with the end token, as Stable Diffusion 1 does.
        length: tokens of every prompt.
    """
    alphabet = list(byte_alphabet().values())
    merges_wanted = VOCABULARY_SIZE - 2 * len(alphabet) - 2
    with resources.files("stablesr_kit").joinpath(VOCABULARY).open("rb") as packed:
        lines = gzip.decompress(packed.read()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, itertools.islice(lines, 1, 1 + merges_wanted))]
    words = alphabet + [f"{letter}</w>" for letter in alphabet] + [left + right for left, right in merges]
    tokens = [*words, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token="!" if pads_with_zero else "<|endoftext|>",
        model_max_length=length,
    )


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte, in the order of CLIP's vocabulary (Radford et al. 2019, GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others follow as the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@torch.no_grad()
def embed_empty_prompt(text_encoder: CLIPTextModel, tokenizer: Any | None = None) -> Tensor:
    """Embedding (1, tokens, channels) of the empty prompt: <start>, <end>, then padding to the full length.

    Without a tokenizer the padding is that of the text encoder's config: zeros for open_clip, else <end>.
    """
    config = text_encoder.config
    if tokenizer is not None:
        return embed_prompt("", text_encoder, tokenizer)
    tokens = torch.full((1, config.max_position_embeddings), config.pad_token_id)
    tokens[0, :2] = torch.tensor([config.bos_token_id, config.eos_token_id])
    return text_encoder(tokens)[0]


@torch.no_grad()
def embed_prompt(
    text: str | list[str],
    text_encoder: CLIPTextModel,
    tokenizer: Any,
    device: torch.device | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Embeddings (texts, tokens, channels) of a text or several, each padded or cut to the full length.

    device: where the text encoder computes; None is where its weights are. clip_skip: its last layers to skip.
    """
    length = tokenizer.model_max_length
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    tokens = tokens.to(text_encoder.device if device is None else device)
    has_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask if has_mask else None
    if clip_skip is None:
        return text_encoder(tokens.input_ids, attention_mask=mask)[0]
    hidden = text_encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    tower: Any = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 moved the tower one level up
    return tower.final_layer_norm(hidden[-(clip_skip + 1)])


def _renamed(
    network: Callable[..., Network],
    modules: Callable[[Config], Modules],
    checkpoint: Checkpoint,
    section: Section,
    config: Config,
    options: AssemblyOptions,
) -> Network:
    """A network whose tensors differ from the official ones only in name."""
    return assemble(
        lambda: network(**config),
        lambda names: renamed_recipes(names, modules(config)),
        checkpoint.sections[section],
        what=TITLES[section],
        prefix=PREFIXES[section],
        options=options,
    )


def load_spandrel(path: Path, device: torch.device | str = "cpu") -> "ImageModelDescriptor[torch.nn.Module]":
    """The network of a file, from RGB to RGB; its call pads and clamps, (B, 3, h, w) in [0, 1] on both sides.

    If spandrel_extra_arches is installed, its architectures work too; some of them forbid commercial use.

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the file holds no such network, or one that does not turn RGB into RGB.
    """
    try:
        from spandrel import MAIN_REGISTRY, ArchRegistry, ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ImportError as error:
        raise ConfigError(
            f"{path}: networks of other projects need an extra; pip install 'stablesr-kit[spandrel]'"
        ) from error
    registry = ArchRegistry()
    registry.add(*MAIN_REGISTRY)
    try:
        from spandrel_extra_arches import EXTRA_REGISTRY
    except ImportError:
        pass
    else:
        registry.add(*EXTRA_REGISTRY)
    weights = read_checkpoint(path).content
    try:
        model = ModelLoader(device=torch.device(device), registry=registry).load_from_state_dict(dict(weights))
    except (UnsupportedModelError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: no super-resolution network that spandrel knows ({reason})") from error
    if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise CheckpointError(f"{path}: a network of {model.architecture.name} that does not turn RGB into RGB")
    return model.eval()
