"""Write networks in the layout of the official checkpoints: the inverse of `stablesr_kit.checkpoints`.

The affine part of SPADE's norm is invented here and taken out of gamma and beta, so that converting puts it back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from stablesr_kit.checkpoints import key_maps
from stablesr_kit.checkpoints.key_maps import PREFIXES, translate
from stablesr_kit.models.codeformer import CodeFormer
from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.models.feature_wrapping import ControllableFeatureWrapping
from stablesr_kit.models.steering import make_steerable
from stablesr_kit.models.time_aware_encoder import StableSRAdapter
from stablesr_kit.models.vqgan import VQGAN


def randomize(network: nn.Module, seed: int) -> Any:
    """Every parameter random, none zero; norms near the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / max(1, parameter[0].numel()) ** 0.5
        else:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
    return network.eval()


def tiny_networks(
    *,
    widths: tuple[int, ...] = (32, 64),
    layers: int = 1,
    has_attention: tuple[bool, ...] = (True, False),
    linear: bool = True,
    head_channels: int = 8,
    encoder_heads: int = 4,
    context: int = 24,
) -> dict[str, Any]:
    """Random components of a pipeline as small as they get; the encoder and the autoencoder follow the UNet's depth."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in has_attention[::-1]),
        cross_attention_dim=context,
        attention_head_dim=[width // head_channels for width in widths],
        use_linear_projection=linear,
    )
    vae_widths = (32, 64, 32, 32)[: len(widths) + 1]
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
        latent_channels=4,
        sample_size=64 * 2 ** (len(vae_widths) - 1),
    )
    adapter = StableSRAdapter.from_unet(
        unet,
        block_out_channels=tuple(32 * (1 + i % 2) for i in range(len(widths))),
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention),
        layers_per_block=layers,
        num_attention_heads=encoder_heads,
        cond_channels=32,
        hidden_channels=16,
        prompt_length=0,
    )
    make_steerable(unet)
    cfw = ControllableFeatureWrapping.from_vae(vae, levels=(1, 2)[: len(widths) - 1], num_rrdb=1, growth_channels=8)
    return {
        "unet": randomize(unet, 1),
        "vae": randomize(vae, 2),
        "adapter": randomize(adapter, 3),
        "cfw": randomize(cfw, 4),
    }


def tiny_text_encoder(*, act: str = "gelu", vocab: int = 60, length: int = 7) -> CLIPTextModel:
    """A random text encoder; "gelu" as open_clip, "quick_gelu" as the CLIP of Stable Diffusion 1."""
    width = 24
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=0 if act == "gelu" else vocab - 1,
    )
    return randomize(CLIPTextModel(config), 5)


def official_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    modules = key_maps.unet_modules(unet.config)
    return {PREFIXES["unet"] + translate(name, modules): tensor for name, tensor in unet.state_dict().items()}


def official_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Attention as 1 x 1 convolutions, which is how the official autoencoder keeps it."""
    modules = key_maps.vae_modules(vae.config)
    return {
        PREFIXES["vae"] + translate(name, modules): tensor[..., None, None]
        if ".to_" in name and tensor.ndim == 2
        else tensor
        for name, tensor in vae.state_dict().items()
    }


def official_cfw(cfw: ControllableFeatureWrapping) -> dict[str, Tensor]:
    modules = key_maps.fusion_modules(cfw.config)
    return {PREFIXES["fusion"] + translate(name, modules): tensor for name, tensor in cfw.state_dict().items()}


def official_encoder(adapter: StableSRAdapter) -> dict[str, Tensor]:
    """Attention as 1-d convolutions, queries, keys and values interleaved head by head."""
    modules = key_maps.time_aware_encoder_modules(adapter.config)
    heads = adapter.config.num_attention_heads
    state = {name: tensor for name, tensor in adapter.state_dict().items() if not name.startswith("sft_layers.")}
    official = {}
    for name, tensor in state.items():
        if name.endswith((".to_q.weight", ".to_q.bias")):
            parts = [state[name.replace("to_q", which)].unflatten(0, (heads, -1)) for which in ("to_q", "to_k", "to_v")]
            tensor = torch.stack(parts, dim=1).flatten(0, 2)
            name = translate(name, modules).replace("to_q", "qkv")
        elif ".to_k." in name or ".to_v." in name:
            continue
        else:
            name = translate(name, modules)
        is_attention = tensor.ndim == 2 and name.endswith(("qkv.weight", "proj_out.weight"))
        official[PREFIXES["encoder"] + name] = tensor[..., None] if is_attention else tensor
    return official


def official_spade(adapter: StableSRAdapter, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    modules = key_maps.unet_modules(unet.config)
    generator = torch.Generator().manual_seed(6)
    official: dict[str, Tensor] = {}
    for (block, channels, _), layer in zip(adapter.config.sft_blocks, adapter.sft_layers, strict=True):
        prefix = f"{PREFIXES['spade']}{modules[block][0]}.spade."
        scale = 1 + 0.1 * torch.randn(channels, generator=generator)
        shift = 0.1 * torch.randn(channels, generator=generator)
        gamma_weight, beta_weight = layer.gamma_beta.weight.detach().chunk(2)
        gamma_bias, beta_bias = layer.gamma_beta.bias.detach().chunk(2)
        gamma_weight, gamma_bias = gamma_weight / scale[:, None, None, None], (1 + gamma_bias) / scale - 1
        official |= {
            f"{prefix}param_free_norm.weight": scale,
            f"{prefix}param_free_norm.bias": shift,
            f"{prefix}mlp_shared.0.weight": layer.shared.weight.detach(),
            f"{prefix}mlp_shared.0.bias": layer.shared.bias.detach(),
            f"{prefix}mlp_gamma.weight": gamma_weight,
            f"{prefix}mlp_gamma.bias": gamma_bias,
            f"{prefix}mlp_beta.weight": beta_weight - shift[:, None, None, None] * gamma_weight,
            f"{prefix}mlp_beta.bias": beta_bias - shift * (1 + gamma_bias),
        }
    return official


def official_text(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The layout of open_clip, with the layer after the one that is read, and what else its file holds."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    count, width = text_encoder.config.num_hidden_layers, text_encoder.config.hidden_size
    official = {theirs: state[ours] for ours, theirs in key_maps.OPEN_CLIP.items()}
    for i in range(count + 1):
        ours, theirs = f"encoder.layers.{min(i, count - 1)}.", f"model.transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{which}_proj.{kind}"] for which in "qkv"]
            official[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for child, their_child in key_maps.OPEN_CLIP_LAYER.items():
                official[f"{theirs}{their_child}.{kind}"] = state[f"{ours}{child}.{kind}"]
    official |= {"model.text_projection": torch.eye(width), "model.logit_scale": torch.tensor(4.6)}
    return {PREFIXES["text"] + name: tensor for name, tensor in official.items()}


def official_checkpoint(components: Mapping[str, Any], text_encoder: CLIPTextModel | None = None) -> dict[str, Tensor]:
    """A complete StableSR state dict, with the schedule's buffers."""
    official = official_unet(components["unet"]) | official_spade(components["adapter"], components["unet"])
    official |= official_encoder(components["adapter"]) | official_vae(components["vae"])
    if text_encoder is not None:
        official |= official_text(text_encoder)
    schedule = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2")
    return official | {name: torch.ones(1000) for name in schedule}


def official_cfw_checkpoint(components: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the autoencoder with CFW, without prefix, with what its loss leaves in it."""
    both = official_vae(components["vae"]) | official_cfw(components["cfw"])
    official = {name.removeprefix(PREFIXES["vae"]): tensor for name, tensor in both.items()}
    return official | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4)}


def official_faces(network: CodeFormer | VQGAN | VQGANDiscriminator) -> dict[str, Tensor]:
    """The state dict of an official module of CodeFormer's family; attention as 1 x 1 convolutions."""
    if isinstance(network, CodeFormer):
        modules = key_maps.codeformer_modules(network.config)
    elif isinstance(network, VQGAN):
        modules = key_maps.vqgan_modules(network.config)
    else:
        modules = key_maps.discriminator_modules()
    official = {}
    for name, tensor in network.state_dict().items():
        theirs = "position_emb" if name == "positions" else translate(name, modules)
        if "to_qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                official[theirs.replace("to_qkv", letter)] = part[..., None, None] if part.ndim == 2 else part
        else:
            is_convolution = theirs.endswith("proj_out.weight")
            official[theirs] = tensor[..., None, None] if is_convolution else tensor
    return official
