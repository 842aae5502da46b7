"""Build one network from the tensors of another layout: nothing missing, nothing left over, every shape as expected.

A recipe says which official tensors become one of ours, and how.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm

from stablesr_kit.checkpoints import key_maps
from stablesr_kit.checkpoints.canonical import complain, left_over
from stablesr_kit.checkpoints.key_maps import Modules, rename_child, translate
from stablesr_kit.errors import CheckpointError

Network = TypeVar("Network", bound=nn.Module)


class AssemblyOptions(NamedTuple):
    """Options for all networks of a conversion."""

    dtype: torch.dtype = torch.float32
    ignore: tuple[str, ...] = ()
    """Regular expressions of full names that may be left over, in addition to `IGNORED`."""


class Recipe(NamedTuple):
    """Where one of our tensors comes from."""

    sources: tuple[str, ...]
    """Official names."""
    make: Callable[..., Tensor]
    """Makes our tensor from those."""


Recipes = dict[str, Recipe]
"""Name of our tensor -> its recipe."""


def assemble(
    build: Callable[[], Network],
    recipes_for: Callable[[list[str]], Recipes],
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    prefix: str = "",
    own: Mapping[str, Tensor] | None = None,
    options: AssemblyOptions,
) -> Network:
    """The network, in eval mode. Where dtype allows, its parameters are the given tensors, not copies of them.

    Args:
        build: makes the network; it is run without allocating parameters.
        recipes_for: gives a recipe for each of our names.
        tensors: official names, without `prefix`.
        what: the network's name in messages.
        own: our tensors that have no official counterpart.

    Raises `CheckpointError`, which names every missing tensor, every one left over and every wrong shape.
    """
    try:
        with init_empty_weights():
            network = build()
    except (ValueError, RuntimeError, ArithmeticError) as error:  # the config, read from a broken file, makes no sense
        raise CheckpointError(f"{what}: no such network can be made ({' '.join(str(error).split())})") from error
    own = own or {}
    expected = network.state_dict()
    recipes = recipes_for([name for name in expected if name not in own])
    wanted = dict.fromkeys(source for recipe in recipes.values() for source in recipe.sources)
    complain(f"{what}: missing from the file", [prefix + name for name in wanted if name not in tensors])
    complain(
        f"{what}: not understood", left_over([prefix + name for name in tensors if name not in wanted], options.ignore)
    )

    weights, wrong = dict(own), []
    # A bar where somebody looks at a terminal: the tensors are read from the disk as they are used.
    for name, recipe in tqdm(recipes.items(), desc=what, unit="tensor", leave=False, disable=None):
        sources = [tensors[source] for source in recipe.sources]
        shape = expected[name].shape
        try:
            tensor = recipe.make(*sources)
            is_right = _without_kernel(tensor.shape) == _without_kernel(shape)
        except (RuntimeError, IndexError):  # the shapes do not even fit each other
            is_right = False
        if is_right:
            dtype = options.dtype if tensor.is_floating_point() else tensor.dtype
            weights[name] = tensor.to(dtype).reshape(shape).contiguous()
        else:
            given = (f"{prefix}{source} {tuple(tensors[source].shape)}" for source in recipe.sources)
            wrong.append(f"{', '.join(given)} for {tuple(shape)}")
    complain(f"{what}: other shapes than expected", wrong)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def _without_kernel(shape: torch.Size) -> tuple[int, ...]:
    """The shape without a 1 x 1 kernel: a convolution has one, the equivalent linear layer has none."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def renamed_recipes(names: Iterable[str], modules: Modules) -> Recipes:
    """Recipes that only rename: for the UNet, the autoencoder and CFW."""
    return {name: Recipe((translate(name, modules),), as_it_is) for name in names}


def adapter_recipes(names: Iterable[str], config: dict[str, Any], unet_config: dict[str, Any]) -> Recipes:
    """Recipes for time-aware encoder and SFT layers; official names are full names."""
    encoder_modules = key_maps.time_aware_encoder_modules(config)
    unet_modules = key_maps.unet_modules(unet_config)
    heads = config["num_attention_heads"]
    recipes: Recipes = {}
    for name in names:
        if sft := re.fullmatch(r"sft_layers\.(\d+)\.(shared|gamma_beta)\.(weight|bias)", name):
            block = config["sft_blocks"][int(sft[1])][0]
            spade = f"{key_maps.PREFIXES['spade']}{unet_modules[block][0]}.spade"
            if sft[2] == "shared":
                recipes[name] = Recipe((f"{spade}.mlp_shared.0.{sft[3]}",), as_it_is)
            else:
                parts = ("mlp_gamma", "mlp_beta", "param_free_norm")
                sources = [f"{spade}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
                recipes[name] = Recipe(tuple(sources), partial(gamma_beta, kind=sft[3]))
        elif qkv := re.fullmatch(r"(.+\.attentions\.\d+)\.to_([qkv])\.(weight|bias)", name):
            source = f"{key_maps.PREFIXES['encoder']}{encoder_modules[qkv[1]][0]}.qkv.{qkv[3]}"
            recipes[name] = Recipe((source,), partial(part_of_heads, index="qkv".index(qkv[2]), heads=heads))
        else:
            recipes[name] = Recipe((key_maps.PREFIXES["encoder"] + translate(name, encoder_modules),), as_it_is)
    return recipes


def face_recipes(names: Iterable[str], modules: Modules) -> Recipes:
    """Recipes for CodeFormer and its VQGAN, where one layer gives queries, keys and values of an attention."""
    recipes: Recipes = {}
    for name in names:
        if name == "positions":  # a table that belongs to no module
            recipes[name] = Recipe(("position_emb",), as_it_is)
        elif ".to_qkv." in name:
            recipes[name] = Recipe(
                tuple(translate(name, modules).replace("to_qkv", part) for part in "qkv"), lambda *qkv: torch.cat(qkv)
            )
        else:
            recipes[name] = Recipe((translate(name, modules),), as_it_is)
    return recipes


def part_of_heads(qkv: Tensor, index: int, heads: int) -> Tensor:
    """Queries, keys or values (C, ...) of qkv (3C, ...), stored head by head: q, k, v of head 1, of head 2 ..."""
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


def open_clip_recipes(names: Iterable[str]) -> Recipes:
    """Recipes for CLIPTextModel from the text tower of open_clip."""
    recipes: Recipes = {}
    for name in names:
        ours = name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", ours)
        if layer is None:
            recipes[name] = Recipe((key_maps.OPEN_CLIP[ours],), as_it_is)
            continue
        block = f"model.transformer.resblocks.{layer[1]}"
        if qkv := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2]):
            make = partial(third, index="qkv".index(qkv[1]))
            recipes[name] = Recipe((f"{block}.attn.in_proj_{qkv[2]}",), make)
        else:
            recipes[name] = Recipe((f"{block}.{rename_child(layer[2], key_maps.OPEN_CLIP_LAYER)}",), as_it_is)
    return recipes


def third(qkv: Tensor, index: int) -> Tensor:
    """Queries, keys or values (C, ...) of (3C, ...). A copy, since tensors that share memory cannot be saved."""
    return qkv.chunk(3)[index].clone()


def clip_recipes(names: Iterable[str], available: Iterable[str]) -> Recipes:
    """Recipes for CLIPTextModel from transformers' own, whose newer releases dropped the prefix `text_model.`."""
    prefix = "transformer.text_model." if any(".text_model." in name for name in available) else "transformer."
    return {name: Recipe((prefix + name.removeprefix("text_model."),), as_it_is) for name in names}
