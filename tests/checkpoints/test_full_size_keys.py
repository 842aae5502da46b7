"""At the size of Stable Diffusion 2.1, on the meta device: every official tensor has its place, none is left over."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stablesr_kit.checkpoints.assembling import AssemblyOptions
from stablesr_kit.checkpoints.canonical import Checkpoint, section
from stablesr_kit.checkpoints.converting import convert
from stablesr_kit.checkpoints.detecting import detect
from stablesr_kit.checkpoints.key_maps import PREFIXES
from stablesr_kit.checkpoints.networks import build_adapter, build_cfw, build_unet, build_vae

LISTS = Path(__file__).parents[1] / "goldens" / "full_size"


def official(part: str) -> dict[str, Tensor]:
    """The names and shapes of one official module."""
    lines = (line.split("\t") for line in (LISTS / f"keys_full_{part}.txt").read_text().splitlines())
    return {name: torch.empty(ast.literal_eval(shape), device="meta") for name, shape in lines}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """As stablesr_000117.ckpt, without text tower and buffers."""
    tensors = {PREFIXES["unet"] + name: tensor for name, tensor in official("unet").items()}
    tensors |= {PREFIXES["encoder"] + name: tensor for name, tensor in official("encoder").items()}
    return section(Path("stablesr_000117.ckpt"), tensors)


@pytest.fixture(scope="module")
def cfw() -> Checkpoint:
    return section(Path("vqgan_cfw_00011.ckpt"), official("cfw"))


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_lists_are_complete() -> None:
    assert [len(official(part)) for part in ("unet", "encoder", "cfw")] == [862, 200, 404]


def test_the_unet_is_that_of_stable_diffusion_2_1(checkpoint: Checkpoint) -> None:
    config = detect(checkpoint).unet
    assert config == {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    }
    assert count(build_unet(checkpoint, config, AssemblyOptions())) == 865_910_724


def test_the_adapter_takes_every_tensor_of_encoder_and_spade(checkpoint: Checkpoint) -> None:
    found = detect(checkpoint)
    assert found.unet is not None and found.adapter is not None
    unet = build_unet(checkpoint, found.unet, AssemblyOptions())
    adapter = build_adapter(checkpoint, found.adapter, unet, None, AssemblyOptions())
    folded = sum(2 * channels for _, channels, _ in adapter.config.sft_blocks)  # the affine norms of SPADE
    assert count(adapter) == 52_494_080 + 53_020_160 - folded
    assert adapter.config.block_out_channels == (256, 256, 512, 512)


def test_cfw_and_its_autoencoder_take_every_tensor(cfw: Checkpoint) -> None:
    found = detect(cfw)
    assert found.family == "cfw" and found.vae is not None and found.cfw is not None
    assert count(build_vae(cfw, found.vae, AssemblyOptions())) == 83_653_863
    assert count(build_cfw(cfw, found.cfw, AssemblyOptions())) == 44_393_728
    assert found.cfw == {"channels": (256, 512), "levels": (1, 2), "num_rrdb": 2, "growth_channels": 32}


def test_the_whole_conversion_leaves_nothing_over(checkpoint: Checkpoint, cfw: Checkpoint) -> None:
    converted = convert(checkpoint, cfw=cfw, prediction_type="epsilon")
    parts = ("unet", "vae", "adapter", "cfw")
    assert all(parameter.is_meta for part in parts for parameter in converted[part].parameters())
