"""What a checkpoint is, and the hyperparameters that follow from its names and shapes.

Nothing here imports diffusers or transformers: that takes longer than reading a file of 5 GB.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from stablesr_kit.checkpoints.canonical import Checkpoint
from stablesr_kit.errors import CheckpointError

Family = Literal[
    "stablesr",
    "stablesr extract",
    "cfw",
    "stable diffusion",
    "autoencoder",
    "diffusers weights",
    "unsupported diffusion",
    "pisa-sr",
    "osediff",
    "hypir",
    "invsr",
    "lora",
    "codeformer",
    "vqgan",
    "vqgan discriminator",
    "real-esrgan",
    "retinaface",
    "parsenet",
    "yolov5-face",
    "unknown",
]

ONE_STEP: tuple[Family, ...] = ("pisa-sr", "osediff", "hypir", "invsr")
"""Restorers of one or a few steps, which need a Stable Diffusion (--base)."""

Config = dict[str, Any]

SIGNATURES: tuple[tuple[Family, str, str], ...] = (
    ("unsupported diffusion", "a Stable Diffusion XL or refiner checkpoint", r"^conditioner\.embedders\."),
    ("unsupported diffusion", "a ControlNet checkpoint", r"^control_model\."),
    ("pisa-sr", "PiSA-SR, a one-step restorer", r"^unet\..+\.lora_A\.default_\w+_pix\.weight$"),
    ("osediff", "OSEDiff, a one-step restorer", r"^unet\..+\.lora_A\.default_\w+\.weight$"),
    ("hypir", "HYPIR, a one-step restorer", r"^(down_blocks|mid_block|up_blocks)\..+\.lora_A\.default\.weight$"),
    ("invsr", "the noise predictor of InvSR, a restorer of one to five steps", r"^encoder\.time_embedding\.linear_1\."),
    ("lora", "a LoRA", r"(\.lora_(down|up|A|B)\.|^lora_(unet|te)_)"),
    ("codeformer", "a CodeFormer checkpoint (face restoration)", r"^idx_pred_layer\.1\.weight$"),
    ("vqgan", "a VQGAN of CodeFormer (faces)", r"^quantize\.embed(ding)?\."),
    ("vqgan discriminator", "the discriminator of a VQGAN", r"^main\.0\.weight$"),
    ("real-esrgan", "a Real-ESRGAN or ESRGAN network", r"^(body|RRDB_trunk)\.0\.rdb1\."),
    ("retinaface", "a RetinaFace detector", r"^BboxHead\.0\."),
    ("parsenet", "a ParseNet face parser", r"^out_mask_conv\."),
    ("yolov5-face", "a YOLOv5-face detector", r"^model\.\d+\.(conv|stem_1)\."),
    ("diffusers weights", "weights of one diffusers model", r"^(encoder\.)?(down_blocks\.|conv_norm_out\.)"),
)
"""Checkpoints without sections of Stable Diffusion: (family, description, a name that only this family has)."""

RELEASED_LATENT_SIZE = 16
RELEASED_HEADS = 8
BLOCK_KINDS: Mapping[str, str] = {
    "conv1.weight": "residual",
    "proj_out.weight": "attention",
    "conv.weight": "downsampling",
}
"""Which block a tensor name belongs to; all others are single layers."""

PredictionType = Literal["epsilon", "v_prediction"]

PREDICTIONS: Mapping[str, PredictionType] = {
    r"v[-_]?pred": "v_prediction",
    r"768": "v_prediction",
    r"turbo": "epsilon",
    r"512": "epsilon",
    r"stablesr_000117": "epsilon",
}
"""Prediction types by file name, the first match wins: Stable Diffusion 2 and StableSR at 768 px predict v."""


class Prediction(NamedTuple):
    """What the UNet predicts, and how that is known."""

    type: PredictionType
    source: str
    is_certain: bool

    def __str__(self) -> str:
        return f"{self.type} ({'' if self.is_certain else 'assumed: '}{self.source})"


ASSUMED = Prediction("epsilon", "give prediction_type (--prediction-type) if it predicts the velocity", False)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What a checkpoint is, and the diffusers config of each part it holds (None: not in this file)."""

    family: Family
    description: str
    unet: Config | None = None
    vae: Config | None = None
    text: Config | None = None
    adapter: Config | None = None
    cfw: Config | None = None
    faces: Config | None = None
    """Config of a face network, if the file holds one."""


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Hyperparameters that shapes do not show; None is the value of the released models of that kind."""

    unet_head_channels: int | None = None
    """Channels per attention head of the UNet; 64 in Stable Diffusion 2."""
    unet_heads: int | None = None
    """Attention heads of the UNet, at every level; 8 in Stable Diffusion 1."""
    encoder_heads: int | None = None
    """Attention heads of the time-aware encoder; 4 in every release."""
    text_heads: int | None = None
    """Attention heads of the text encoder; one per 64 channels in every CLIP."""
    latent_size: int | None = None
    """Side of the latents the model was trained on; 96 for the 768v models, 16 for the VQGAN of faces, else 64."""
    codeformer_heads: int | None = None
    """Attention heads of CodeFormer; 8 in every release."""
    noise_predictor_head_channels: int | None = None
    """Channels per attention head of InvSR's noise predictor; 64 in every release."""
    noise_predictor_groups: int | None = None
    """Groups of its group norms; 32 in every release."""


class NetworkLevel(NamedTuple):
    """One resolution of a network that halves its input level by level."""

    channels: int
    layers: int
    has_attention: bool


def detect(checkpoint: Checkpoint, hints: Hints | None = None) -> Detection:
    """The family of a checkpoint and the configs of its parts.

    Raises `CheckpointError` if a part has a shape that no model of its family has.
    """
    hints = hints or Hints()
    sections = checkpoint.sections
    named = _by_signature(checkpoint, hints)
    if named is not None:
        return named
    unet, spade, encoder = (sections.get(part) for part in ("unet", "spade", "encoder"))
    vae, fusion, text = (sections.get(part) for part in ("vae", "fusion", "text"))
    try:
        parts: dict[str, Config | None] = {
            "unet": unet_config(unet, hints) if unet else None,
            "vae": vae_config(vae, sections.get("other", {}), hints) if vae else None,
            "text": text_config(text, hints) if text else None,
            "adapter": adapter_config(spade, encoder, hints) if spade and encoder else None,
            "cfw": cfw_config(fusion) if fusion else None,
        }
    except LookupError as error:  # a name that its family always has is absent, or its tensor has too few dimensions
        raise CheckpointError(f"{checkpoint.path.name} has names of Stable Diffusion, but is incomplete") from error
    if parts["adapter"] and parts["unet"]:
        return Detection(family="stablesr", description="a complete StableSR checkpoint", **parts)
    if parts["adapter"]:
        return Detection(family="stablesr extract", description="a web-UI extract of StableSR", **parts)
    if parts["unet"]:
        kind = "2" if parts["unet"]["use_linear_projection"] else "1"
        return Detection(family="stable diffusion", description=f"a Stable Diffusion {kind}.x checkpoint", **parts)
    if parts["cfw"]:
        return Detection(family="cfw", description="an autoencoder with CFW", **parts)
    if parts["vae"]:
        return Detection(family="autoencoder", description="an autoencoder of Stable Diffusion", **parts)
    return Detection(family="unknown", description="a checkpoint of unknown kind", **parts)


def _by_signature(checkpoint: Checkpoint, hints: Hints) -> Detection | None:
    names = checkpoint.full_names()
    vae = checkpoint.sections.get("vae", {})
    for family, description, pattern in SIGNATURES:
        candidates = vae if family == "diffusers weights" and vae else names
        if any(re.search(pattern, name) for name in candidates):
            try:
                faces = face_config(family, names, hints)
            except CheckpointError:  # the file is incomplete, and building the network says what is absent
                faces = None
            return Detection(family=family, description=description, faces=faces)
    return None


def face_config(family: Family, names: Mapping[str, Tensor], hints: Hints) -> Config | None:
    """The config of a network for faces; None for another family.

    Raises `CheckpointError` if the file is incomplete.
    """
    if family == "codeformer":
        return codeformer_config(names, hints.codeformer_heads)
    if family == "vqgan":
        return vqgan_config(names, hints.latent_size)
    if family == "vqgan discriminator":
        return discriminator_config(names)
    return None


def prediction_from_name(name: str) -> Prediction | None:
    """What the UNet predicts, according to the name of a released file."""
    for pattern, prediction in PREDICTIONS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return Prediction(prediction, f"by the file name {name}", True)
    return None


def unet_config(unet: Mapping[str, Tensor], hints: Hints) -> Config:
    """Arguments of UNet2DConditionModel. `unet`: official names without prefix."""
    if "label_emb.0.0.weight" in unet or "label_emb.weight" in unet:
        raise CheckpointError("the UNet has class conditioning (XL, unCLIP, x4 upscaler); use Stable Diffusion 1 or 2")
    levels = _levels(unet, "the UNet")
    channels = [level.channels for level in levels]
    key = first(unet, r"\.attn2\.to_k\.weight$", "the UNet has no cross attention")
    use_linear = unet[first(unet, r"\.proj_in\.weight$", "the UNet has no transformer")].ndim == 2
    if hints.unet_head_channels:
        heads = [max(1, width // hints.unet_head_channels) for width in channels]
    elif hints.unet_heads or not use_linear:
        heads = [hints.unet_heads or 8] * len(channels)
    else:
        heads = [max(1, width // 64) for width in channels]
    return {
        "sample_size": hints.latent_size or 64,
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": shape(unet, "out.2.weight", "the UNet")[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": levels[0].layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if level.has_attention else "DownBlock2D" for level in levels),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if level.has_attention else "UpBlock2D" for level in reversed(levels)
        ),
        "transformer_layers_per_block": 1 + max(indices(unet, r"\.transformer_blocks\.(\d+)\."), default=0),
        "cross_attention_dim": unet[key].shape[1],
        "attention_head_dim": heads,  # diffusers means the number of heads by it
        "use_linear_projection": use_linear,
    }


def adapter_config(spade: Mapping[str, Tensor], encoder: Mapping[str, Tensor], hints: Hints) -> Config:
    """Arguments of StableSRAdapter beyond those the UNet decides; official names without prefix."""
    levels = _levels(encoder, "the time-aware encoder")
    shared = spade[first(spade, r"\.spade\.mlp_shared\.0\.weight$", "the SPADE layers lack their shared convolution")]
    return {
        "block_out_channels": tuple(level.channels for level in levels),
        "down_block_types": tuple("AttnDownBlock2D" if level.has_attention else "DownBlock2D" for level in levels),
        "layers_per_block": levels[0].layers,
        "num_attention_heads": hints.encoder_heads or 4,
        "cond_channels": shared.shape[1],
        "hidden_channels": shared.shape[0],
        "modulation": "spade",
    }


def vae_config(vae: Mapping[str, Tensor], other: Mapping[str, Tensor], hints: Hints) -> Config:
    """Arguments of AutoencoderKL. `vae`: official names without prefix; `other`: may hold the latent's scale."""
    count = 1 + max(indices(vae, r"^encoder\.down\.(\d+)\."), default=-1)
    if not count:
        raise CheckpointError("the autoencoder has no encoder; StableSR needs a complete autoencoder")
    channels = tuple(shape(vae, f"encoder.down.{i}.block.0.conv1.weight", "the autoencoder")[0] for i in range(count))
    scale = other.get("scale_factor")
    latent_channels = shape(vae, "decoder.conv_in.weight", "the autoencoder")[1]
    return {
        "sample_size": (hints.latent_size or 64) * 2 ** (count - 1),
        "block_out_channels": channels,
        "layers_per_block": 1 + max(indices(vae, r"^encoder\.down\.0\.block\.(\d+)\."), default=0),
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "latent_channels": latent_channels,
        "scaling_factor": 0.18215 if scale is None or scale.is_meta else float(scale),
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
    }


def cfw_config(fusion: Mapping[str, Tensor]) -> Config:
    """Arguments of ControllableFeatureWrapping. `fusion`: names after `decoder.fusion_layer_`."""
    levels = tuple(sorted(indices(fusion, r"^(\d+)\.")))
    first = f"{levels[0]}.encode_enc_2.0.rdb1.conv1.weight"
    return {
        "channels": tuple(shape(fusion, f"{level}.encode_enc_3.conv1.weight", "CFW")[0] for level in levels),
        "levels": levels,
        "num_rrdb": 1 + max(indices(fusion, r"^\d+\.encode_enc_2\.(\d+)\."), default=-1),
        "growth_channels": shape(fusion, first, "CFW")[0],
    }


def text_config(text: Mapping[str, Tensor], hints: Hints) -> Config:
    """Arguments of CLIPTextConfig. `text`: official names without prefix, in open_clip's or transformers' layout."""
    is_open_clip = "model.ln_final.weight" in text
    if is_open_clip:
        layers = max(indices(text, r"^model\.transformer\.resblocks\.(\d+)\."), default=0)  # the last is unused
        positions, tokens = text["model.positional_embedding"], text["model.token_embedding.weight"]
        width_key = r"^model\.transformer\.resblocks\.0\.mlp\.c_fc\.weight$"
    else:
        layers = 1 + max(indices(text, r"\.encoder\.layers\.(\d+)\."), default=-1)
        positions, tokens = (
            text[first(text, rf"{kind}_embedding\.weight$", "the text encoder has no embedding")]
            for kind in ("position", "token")
        )
        width_key = r"\.layers\.0\.mlp\.fc1\.weight$"
    hidden = tokens.shape[1]
    return {
        "vocab_size": tokens.shape[0],
        "hidden_size": hidden,
        "intermediate_size": text[first(text, width_key, "the text encoder has no layers")].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": hints.text_heads or max(1, hidden // 64),
        "max_position_embeddings": positions.shape[0],
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "projection_dim": hidden,
        "bos_token_id": tokens.shape[0] - 2,
        "eos_token_id": tokens.shape[0] - 1,
        "pad_token_id": 0 if is_open_clip else tokens.shape[0] - 1,
    }


def _levels(part: Mapping[str, Tensor], what: str) -> list[NetworkLevel]:
    """Levels of an LDM-like network, in the order of `input_blocks`."""
    shape(part, "input_blocks.0.0.weight", what)
    levels = [NetworkLevel(0, 0, False)]
    for n in range(1, 1 + max(indices(part, r"^input_blocks\.(\d+)\."))):
        if f"input_blocks.{n}.0.op.weight" in part:
            levels.append(NetworkLevel(0, 0, False))
        else:
            channels = shape(part, f"input_blocks.{n}.0.out_layers.3.weight", what)[0]
            has_attention = f"input_blocks.{n}.1.norm.weight" in part
            levels[-1] = NetworkLevel(channels, levels[-1].layers + 1, has_attention)
    if len({level.layers for level in levels}) != 1:
        raise CheckpointError(
            f"{what} has {[level.layers for level in levels]} blocks per level; expected the same number"
        )
    return levels


def codeformer_config(names: Mapping[str, Tensor], heads: int | None = None) -> Config:
    """Arguments of CodeFormer. heads: None is the number of the released models; shapes do not show it."""
    what = "CodeFormer"
    positions, dim = shape(names, "position_emb", what)
    latent_size = math.isqrt(positions)
    if latent_size**2 != positions:
        raise CheckpointError(f"{what} has {positions} positions, expected the number of a square")
    config = vqgan_config(names, latent_size)
    if config.pop("quantization") != "nearest":
        raise CheckpointError(f"{what} has a Gumbel quantizer, expected the nearest one")
    return config | {
        "dim": dim,
        "num_heads": heads or RELEASED_HEADS,
        "num_layers": 1 + max(indices(names, r"^ft_layers\.(\d+)\."), default=-1),
        "fuse_sizes": tuple(sorted(indices(names, r"^fuse_convs_dict\.(\d+)\.scale\.0\.weight$"))),
    }


def vqgan_config(names: Mapping[str, Tensor], latent_size: int | None = None) -> Config:
    """Arguments of VQGAN. latent_size: side of the latents it was trained on; None is 16."""
    what = "the VQGAN"
    is_gumbel = "quantize.embed.weight" in names
    codes = shape(names, "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", what)
    base_channels = shape(names, "encoder.blocks.0.weight", what)[0]
    levels = _vqgan_levels(names, what)
    image_size = (latent_size or RELEASED_LATENT_SIZE) * 2 ** (len(levels) - 1)
    widths = [shape(names, f"encoder.blocks.{blocks[0]}.conv1.weight", what)[0] for blocks, _ in levels]
    depths = {len(blocks) for blocks, _ in levels}
    if len(depths) != 1 or any(width % base_channels for width in widths):
        raise CheckpointError(f"{what} has levels of {sorted(depths)} blocks and widths {widths} over {base_channels}")
    return {
        "image_size": image_size,
        "base_channels": base_channels,
        "channel_multipliers": tuple(width // base_channels for width in widths),
        "layers_per_block": depths.pop(),
        "attention_resolutions": tuple(image_size // 2**i for i, (_, is_attended) in enumerate(levels) if is_attended),
        "codebook_size": codes[0],
        "code_channels": codes[1],
        "quantization": "gumbel" if is_gumbel else "nearest",
    }


def _vqgan_levels(names: Mapping[str, Tensor], what: str) -> list[tuple[list[int], bool]]:
    """Per level of the encoder: indices of its residual blocks, and whether attention follows them."""
    kinds: dict[int, str] = {}
    for name in names:
        block = re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", name)
        if block and block[2] in BLOCK_KINDS:
            kinds[int(block[1])] = BLOCK_KINDS[block[2]]
    body = sorted(kinds)[:-3]  # the middle is a residual block, attention, and a residual block
    levels: list[tuple[list[int], bool]] = [([], False)]
    for number in body:
        blocks, _ = levels[-1]
        if kinds[number] == "residual":
            blocks.append(number)
        elif kinds[number] == "attention":
            levels[-1] = (blocks, True)
        else:
            levels.append(([], False))
    if not all(blocks for blocks, _ in levels):
        raise CheckpointError(f"{what} has a level without residual blocks; the file is incomplete")
    return levels


def discriminator_config(names: Mapping[str, Tensor]) -> Config:
    """Arguments of VQGANDiscriminator."""
    base_channels, in_channels = shape(names, "main.0.weight", "the discriminator")[:2]
    norms = indices(names, r"^main\.(\d+)\.running_mean$")
    return {"in_channels": in_channels, "base_channels": base_channels, "num_layers": len(norms)}


def indices(names: Mapping[str, Tensor], pattern: str) -> set[int]:
    """The numbers that the pattern's first group finds."""
    return {int(match[1]) for match in (re.search(pattern, name) for name in names) if match}


def first(names: Mapping[str, Tensor], pattern: str, otherwise: str) -> str:
    """The first name that the pattern finds. Raises `CheckpointError` with the text `otherwise` if there is none."""
    for name in names:
        if re.search(pattern, name):
            return name
    raise CheckpointError(otherwise)


def shape(part: Mapping[str, Tensor], name: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor that every network called `what` has. Raises `CheckpointError` if it is absent."""
    if name not in part:
        raise CheckpointError(f"{what} lacks {name}; the file is incomplete or of another family")
    return tuple(part[name].shape)
