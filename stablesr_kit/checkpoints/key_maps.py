"""Tensor names in other people's checkpoints, as data: {our module: their module}. Tensors in a module keep their
names, except for the children listed here."""

from collections.abc import Mapping
from typing import Any, Literal

Section = Literal["unet", "spade", "encoder", "vae", "fusion", "text", "other"]

PREFIXES: Mapping[Section, str] = {
    "unet": "model.diffusion_model.",
    "spade": "model.diffusion_model.",
    "encoder": "structcond_stage_model.",
    "vae": "first_stage_model.",
    "fusion": "first_stage_model.decoder.fusion_layer_",
    "text": "cond_stage_model.",
    "other": "",
}
"""Prefix of each part's names in the released StableSR checkpoints."""

TITLES: Mapping[str, str] = {
    "unet": "UNet",
    "spade": "SFT layers (spade)",
    "encoder": "time-aware encoder",
    "vae": "autoencoder",
    "fusion": "CFW",
    "text": "text encoder",
    "other": "other",
}
"""What each part is called."""

IGNORED: Mapping[str, str] = {
    r"betas|(alphas|sqrt_alphas|sqrt_one_minus_alphas|log_one_minus_alphas|sqrt_recip_alphas|sqrt_recipm1_alphas)_cumprod"
    r"|alphas_cumprod_prev|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights": (
        "the noise schedule, which the scheduler computes"
    ),
    r"logvar": "a learned weight of the training loss",
    r"loss\..*": "LPIPS, discriminator and weights of the loss of CFW training",
    r"scale_factor": "read into the autoencoder's config",
    r"model_ema\..*": "running averages of the weights, which use_ema=True takes instead",
    r"cond_stage_model\.model\.(text_projection|logit_scale)": "compares texts with pictures, after the last layer",
    r"cond_stage_model\.model\.attn_mask|cond_stage_model\..*embeddings\.position_ids": "a constant",
}
"""Full names (regular expressions) that may be left over, each with the reason."""

RESNET: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""A residual block of the UNet and of the time-aware encoder."""

VAE_RESNET: Mapping[str, str] = {"conv_shortcut": "nin_shortcut"}

VAE_ATTENTION: Mapping[str, str] = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}

CODEFORMER_RESNET: Mapping[str, str] = {"conv_shortcut": "conv_out"}
"""A residual block of CodeFormer, and of the fusion layers of StableSR."""

CODE_TRANSFORMER_LAYER: Mapping[str, str] = {"attention": "self_attn", "mlp.0": "linear1", "mlp.2": "linear2"}

OPEN_CLIP: Mapping[str, str] = {
    "embeddings.token_embedding.weight": "model.token_embedding.weight",
    "embeddings.position_embedding.weight": "model.positional_embedding",
    "final_layer_norm.weight": "model.ln_final.weight",
    "final_layer_norm.bias": "model.ln_final.bias",
}
"""Tensors of the text tower of open_clip; its layers are in OPEN_CLIP_LAYER."""

OPEN_CLIP_LAYER: Mapping[str, str] = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}

Modules = Mapping[str, tuple[str, Mapping[str, str]]]
"""Our module -> (their module, {our child: their child})."""


def translate(name: str, modules: Modules) -> str:
    """Their name of our tensor. Raises KeyError if no module of the map holds it."""
    module = name.rpartition(".")[0]
    while module not in modules:
        if not module:
            raise KeyError(name)
        module = module.rpartition(".")[0]
    theirs, children = modules[module]
    return f"{theirs}.{rename_child(name[len(module) + 1 :], children)}"


def rename_child(name: str, children: Mapping[str, str]) -> str:
    """The name with its first part replaced, if `children` has it."""
    for ours, theirs in children.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_modules(config: Mapping[str, Any]) -> Modules:
    """UNet2DConditionModel to the LDM UNet, for a UNet of this diffusers config."""
    has_attention = ["CrossAttn" in block for block in config["down_block_types"]]
    layers, last = config["layers_per_block"], len(has_attention) - 1
    modules = _encoder_side(has_attention, layers)
    modules |= {
        "time_embedding.linear_1": ("time_embed.0", {}),
        "time_embedding.linear_2": ("time_embed.2", {}),
        "conv_norm_out": ("out.0", {}),
        "conv_out": ("out.2", {}),
    }
    for i, with_attention in enumerate(reversed(has_attention)):
        for j in range(layers + 1):
            theirs = f"output_blocks.{i * (layers + 1) + j}"
            modules[f"up_blocks.{i}.resnets.{j}"] = (f"{theirs}.0", RESNET)
            if with_attention:
                modules[f"up_blocks.{i}.attentions.{j}"] = (f"{theirs}.1", {})
        if i < last:
            modules[f"up_blocks.{i}.upsamplers.0.conv"] = (f"{theirs}.{1 + with_attention}.conv", {})
    return modules


def time_aware_encoder_modules(config: Mapping[str, Any]) -> Modules:
    """StableSRAdapter, without its SFT layers, to the structcond encoder, for an adapter of this config."""
    has_attention = ["Attn" in block for block in config["down_block_types"]]
    modules = _encoder_side(has_attention, config["layers_per_block"])
    modules |= {
        "time_embedding.linear_1": ("time_embed.0", {}),
        "time_embedding.linear_2": ("time_embed.2", {}),
    }
    modules |= {f"feature_blocks.{i}": (f"fea_tran.{i}", RESNET) for i in range(len(has_attention))}
    return {
        ours: (theirs, {"group_norm": "norm", "to_out.0": "proj_out"} if ".attentions." in ours else children)
        for ours, (theirs, children) in modules.items()
    }


def _encoder_side(has_attention: list[bool], layers: int) -> dict[str, tuple[str, Mapping[str, str]]]:
    """First convolution, down blocks and middle, which the UNet and the time-aware encoder share."""
    modules: dict[str, tuple[str, Mapping[str, str]]] = {
        "conv_in": ("input_blocks.0.0", {}),
        "mid_block.resnets.0": ("middle_block.0", RESNET),
        "mid_block.attentions.0": ("middle_block.1", {}),
        "mid_block.resnets.1": ("middle_block.2", RESNET),
    }
    for i, with_attention in enumerate(has_attention):
        first = 1 + i * (layers + 1)
        for j in range(layers):
            modules[f"down_blocks.{i}.resnets.{j}"] = (f"input_blocks.{first + j}.0", RESNET)
            if with_attention:
                modules[f"down_blocks.{i}.attentions.{j}"] = (f"input_blocks.{first + j}.1", {})
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = (f"input_blocks.{first + layers}.0.op", {})
    return modules


def vae_modules(config: Mapping[str, Any]) -> Modules:
    """AutoencoderKL to the LDM autoencoder, for an autoencoder of this diffusers config."""
    modules: dict[str, tuple[str, Mapping[str, str]]] = {
        "quant_conv": ("quant_conv", {}),
        "post_quant_conv": ("post_quant_conv", {}),
    }
    for side in ("encoder", "decoder"):
        modules |= {
            f"{side}.conv_in": (f"{side}.conv_in", {}),
            f"{side}.conv_norm_out": (f"{side}.norm_out", {}),
            f"{side}.conv_out": (f"{side}.conv_out", {}),
            f"{side}.mid_block.resnets.0": (f"{side}.mid.block_1", VAE_RESNET),
            f"{side}.mid_block.attentions.0": (f"{side}.mid.attn_1", VAE_ATTENTION),
            f"{side}.mid_block.resnets.1": (f"{side}.mid.block_2", VAE_RESNET),
        }
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for i in range(levels):
        for j in range(layers):
            modules[f"encoder.down_blocks.{i}.resnets.{j}"] = (f"encoder.down.{i}.block.{j}", VAE_RESNET)
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = (f"encoder.down.{i}.downsample", {})
        for j in range(layers + 1):
            modules[f"decoder.up_blocks.{i}.resnets.{j}"] = (f"decoder.up.{levels - 1 - i}.block.{j}", VAE_RESNET)
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = (f"decoder.up.{levels - 1 - i}.upsample", {})
    return modules


def fusion_modules(config: Mapping[str, Any]) -> Modules:
    """ControllableFeatureWrapping to the fusion layers, for a CFW of this config."""
    modules: dict[str, tuple[str, Mapping[str, str]]] = {}
    for level in config["levels"]:
        ours = f"fusion_layers.{level}"
        modules[f"{ours}.merge"] = (f"{level}.encode_enc_1", CODEFORMER_RESNET)
        modules[f"{ours}.refine"] = (f"{level}.encode_enc_3", CODEFORMER_RESNET)
        for i in range(config["num_rrdb"]):
            for j in range(3):
                for k in range(5):
                    theirs = f"{level}.encode_enc_2.{i}.rdb{j + 1}.conv{k + 1}"
                    modules[f"{ours}.rrdbs.{i}.blocks.{j}.convs.{k}"] = (theirs, {})
    return modules


def vqgan_modules(config: Mapping[str, Any]) -> Modules:
    """VQGAN to the VQ autoencoder of CodeFormer, whose two halves are flat lists of blocks, for a VQGAN of this config.

    The quantizer: the official module is `embedding` of the nearest one, `embed` and `proj` of the Gumbel one.
    """
    codebook = {"nearest": "embedding", "gumbel": "embed"}[config["quantization"]]
    modules: dict[str, tuple[str, Mapping[str, str]]] = {
        "quantizer.codebook": (f"quantize.{codebook}", {}),
        "quantizer.projection": ("quantize.proj", {}),
    }
    for half, theirs, side in (("encoder", "encoder", "downsamplers"), ("decoder", "generator", "upsamplers")):
        for number, ours in enumerate(vqgan_blocks(config, half, side)):
            children = {"to_out": "proj_out"} if "attention" in ours else CODEFORMER_RESNET
            modules[f"{half}.{ours}"] = (f"{theirs}.blocks.{number}", children)
    return modules


def vqgan_blocks(config: Mapping[str, Any], half: str, resamplers: str) -> list[str]:
    """Our modules of one half, in the order in which they are applied."""
    sizes = [config["image_size"] // 2**i for i in range(len(config["channel_multipliers"]))]
    middle = ["middle.resnets.0", "middle.attention", "middle.resnets.1"]
    levels: list[str] = []
    for i, size in enumerate(sizes if half == "encoder" else reversed(sizes)):
        for j in range(config["layers_per_block"]):
            levels.append(f"levels.{i}.resnets.{j}")
            if size in config["attention_resolutions"]:
                levels.append(f"levels.{i}.attentions.{j}")
        if i < len(sizes) - 1:
            levels.append(f"{resamplers}.{i}")
    body = levels + middle if half == "encoder" else middle + levels
    return ["conv_in", *body, "norm_out", "conv_out"]


def codeformer_modules(config: Mapping[str, Any]) -> Modules:
    """CodeFormer to the official one, without the position embedding, which is no module."""
    modules = {f"vqgan.{ours}": theirs for ours, theirs in vqgan_modules({**config, "quantization": "nearest"}).items()}
    modules |= {
        "proj_in": ("feat_emb", {}),
        "norm_out": ("idx_pred_layer.0", {}),
        "to_logits": ("idx_pred_layer.1", {}),
    }
    modules |= {f"layers.{i}": (f"ft_layers.{i}", CODE_TRANSFORMER_LAYER) for i in range(config["num_layers"])}
    for size in config["fuse_sizes"]:
        ours, theirs = f"fusions.{size}", f"fuse_convs_dict.{size}"
        modules |= {f"{ours}.{branch}": (f"{theirs}.{branch}", {}) for branch in ("scale", "shift")}
        modules[f"{ours}.merge"] = (f"{theirs}.encode_enc", CODEFORMER_RESNET)
    return modules


def discriminator_modules() -> Modules:
    """VQGANDiscriminator to the official one."""
    return {"layers": ("main", {})}
