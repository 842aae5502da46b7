"""For every tensor of our networks, which tensors of an official checkpoint it is made of, and how."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablesr_kit.checkpoints import key_maps
from stablesr_kit.checkpoints.key_maps import Modules, rename_child, translate


class Recipe(NamedTuple):
    """Where one of our tensors comes from."""

    sources: tuple[str, ...]
    """Official names."""
    make: Callable[..., Tensor]
    """Our tensor from those."""


Plan = dict[str, Recipe]
"""Name of our tensor -> its recipe."""


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def renaming(names: Iterable[str], modules: Modules) -> Plan:
    """Every tensor is one of theirs under another name: the UNet, the autoencoder and CFW."""
    return {name: Recipe((translate(name, modules),), as_it_is) for name in names}


def adapter(names: Iterable[str], config: dict[str, Any], unet_config: dict[str, Any]) -> Plan:
    """Time-aware encoder and SFT layers; sources under their full names."""
    encoder_modules = key_maps.time_aware_encoder_modules(config)
    unet_modules = key_maps.unet_modules(unet_config)
    heads = config["num_attention_heads"]
    plan: Plan = {}
    for name in names:
        if sft := re.fullmatch(r"sft_layers\.(\d+)\.(shared|gamma_beta)\.(weight|bias)", name):
            block = config["sft_blocks"][int(sft[1])][0]
            spade = f"{key_maps.PREFIXES['spade']}{unet_modules[block][0]}.spade"
            if sft[2] == "shared":
                plan[name] = Recipe((f"{spade}.mlp_shared.0.{sft[3]}",), as_it_is)
            else:
                parts = ("mlp_gamma", "mlp_beta", "param_free_norm")
                sources = [f"{spade}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
                plan[name] = Recipe(tuple(sources), partial(gamma_beta, kind=sft[3]))
        elif qkv := re.fullmatch(r"(.+\.attentions\.\d+)\.to_([qkv])\.(weight|bias)", name):
            source = f"{key_maps.PREFIXES['encoder']}{encoder_modules[qkv[1]][0]}.qkv.{qkv[3]}"
            plan[name] = Recipe((source,), partial(part_of_heads, index="qkv".index(qkv[2]), heads=heads))
        else:
            plan[name] = Recipe((key_maps.PREFIXES["encoder"] + translate(name, encoder_modules),), as_it_is)
    return plan


def faces(names: Iterable[str], modules: Modules) -> Plan:
    """CodeFormer and its VQGAN: queries, keys and values of the autoencoder's attention are one layer."""
    plan: Plan = {}
    for name in names:
        if name == "positions":  # a table that belongs to no module
            plan[name] = Recipe(("position_emb",), as_it_is)
        elif ".to_qkv." in name:
            plan[name] = Recipe(
                tuple(translate(name, modules).replace("to_qkv", part) for part in "qkv"), lambda *qkv: torch.cat(qkv)
            )
        else:
            plan[name] = Recipe((translate(name, modules),), as_it_is)
    return plan


def part_of_heads(qkv: Tensor, index: int, heads: int) -> Tensor:
    """(C, ...) queries, keys or values of qkv (3C, ...), which goes head by head: q, k, v of the first, and so on."""
    return qkv.unflatten(0, (heads, 3, -1))[:, index].flatten(0, 1)


def gamma_beta(
    gamma_weight: Tensor,
    gamma_bias: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kind: str,
) -> Tensor:
    """Weight or bias of the convolution that gives gamma | beta, with SPADE's affine norm folded in; float32.

    (n * norm_weight + norm_bias) * (1 + gamma) + beta = n * (1 + gamma') + beta' for every n, if
    gamma' = norm_weight * (1 + gamma) - 1 and beta' = norm_bias * (1 + gamma) + beta. Both are linear in the hidden
    activation that gamma and beta are linear in, so the fold is exact.
    """
    scale, shift = norm_weight.float(), norm_bias.float()
    if kind == "bias":
        gamma, beta = gamma_bias.float(), beta_bias.float()
        return torch.cat([scale * (1 + gamma) - 1, shift * (1 + gamma) + beta])
    gamma, beta = gamma_weight.float(), beta_weight.float()
    scale, shift = scale[:, None, None, None], shift[:, None, None, None]
    return torch.cat([scale * gamma, shift * gamma + beta])


def open_clip_text(names: Iterable[str]) -> Plan:
    """CLIPTextModel from the text tower of open_clip."""
    plan: Plan = {}
    for name in names:
        ours = name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", ours)
        if layer is None:
            plan[name] = Recipe((key_maps.OPEN_CLIP[ours],), as_it_is)
            continue
        block = f"model.transformer.resblocks.{layer[1]}"
        if qkv := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2]):
            make = partial(third, index="qkv".index(qkv[1]))
            plan[name] = Recipe((f"{block}.attn.in_proj_{qkv[2]}",), make)
        else:
            plan[name] = Recipe((f"{block}.{rename_child(layer[2], key_maps.OPEN_CLIP_LAYER)}",), as_it_is)
    return plan


def third(qkv: Tensor, index: int) -> Tensor:
    """(C, ...) queries, keys or values of (3C, ...). A copy: three tensors that share memory cannot be saved."""
    return qkv.chunk(3)[index].clone()


def clip_text(names: Iterable[str], available: Iterable[str]) -> Plan:
    """CLIPTextModel from that of transformers, with or without the `text_model.` that newer releases dropped."""
    prefix = "transformer.text_model." if any(".text_model." in name for name in available) else "transformer."
    return {name: Recipe((prefix + name.removeprefix("text_model."),), as_it_is) for name in names}
