"""The adapter: maps that fit the UNet, depend on the timestep, and survive a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from stablesr_kit import StableSRAdapter
from stablesr_kit.errors import ConfigError
from stablesr_kit.models.steering import SFTMaps, residual_blocks
from stablesr_kit.models.time_aware_encoder import check_adapter
from tests.helpers.tiny import PROMPT_LENGTH, SD1, SD2, TEXT_CHANNELS, tiny_adapter, tiny_unet, unit_noise

LATENTS = unit_noise(2, 4, 8, 8)


def differences(one: SFTMaps, other: SFTMaps) -> list[float]:
    """Largest difference of each map, block by block."""
    assert list(one.maps) == list(other.maps)
    pairs = zip(one.maps.values(), other.maps.values(), strict=True)
    return [(a - b).abs().max().item() for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("config", [SD1, SD2, {"layers_per_block": 2, "block_out_channels": (8, 24)}])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 10), (5, 7)])
@torch.no_grad()
def test_the_maps_have_the_shape_of_the_block_they_modulate(config: dict[str, Any], height: int, width: int) -> None:
    unet = tiny_unet(**config)
    latents = unit_noise(2, 4, height, width)
    shapes = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_hook(lambda _m, _a, h, name=name: shapes.update({name: h.shape}))
    unet(latents, 5, unit_noise(2, 3, TEXT_CHANNELS))
    maps = tiny_adapter(unet)(latents, 5).maps
    assert {name: gamma.shape for name, (gamma, _) in maps.items()} == shapes
    assert {name: beta.shape for name, (_, beta) in maps.items()} == shapes


@torch.no_grad()
def test_an_untrained_sft_adapter_gives_zero_maps_and_a_spade_one_does_not() -> None:
    unet = tiny_unet()
    zeros = tiny_adapter(unet, modulation="sft")(LATENTS, 5)
    assert all(not gamma.any() and not beta.any() for gamma, beta in zeros.maps.values())
    spade = tiny_adapter(unet, modulation="spade")(LATENTS, 5)
    assert all(gamma.any() and beta.any() for gamma, beta in spade.maps.values())
    assert (zeros.modulation, spade.modulation) == ("sft", "spade")


@torch.no_grad()
def test_every_map_depends_on_the_timestep_and_on_the_picture() -> None:
    adapter = tiny_adapter(tiny_unet())
    maps = adapter(LATENTS, 5)
    assert min(differences(maps, adapter(LATENTS, 900))) > 1e-4
    assert min(differences(maps, adapter(-LATENTS, 5))) > 1e-4


@torch.no_grad()
def test_timesteps_may_be_a_number_one_tensor_or_one_per_sample() -> None:
    adapter = tiny_adapter(tiny_unet())
    maps = adapter(LATENTS, 5)
    for same in (5.0, torch.tensor(5), torch.tensor([5.0]), torch.tensor([5, 5])):
        assert max(differences(maps, adapter(LATENTS, same))) == 0
    mixed = adapter(LATENTS, torch.tensor([5, 900])).maps
    alone = adapter(LATENTS[1:], 900).maps
    for name, (gamma, _) in alone.items():
        torch.testing.assert_close(mixed[name][0][1:], gamma, atol=1e-6, rtol=0, msg=name)


@torch.no_grad()
def test_encode_gives_one_feature_per_level_before_it_is_halved() -> None:
    features = tiny_adapter(tiny_unet(), cond_channels=24).encode(unit_noise(2, 4, 8, 12), 5)
    assert [tuple(feature.shape) for feature in features] == [(2, 24, 8, 12), (2, 24, 4, 6)]


@torch.no_grad()
def test_a_saved_adapter_gives_the_same_maps(tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_unet())
    adapter.save_pretrained(tmp_path, variant="fp16")
    loaded = StableSRAdapter.from_pretrained(tmp_path, variant="fp16")
    assert max(differences(loaded(LATENTS, 5), adapter(LATENTS, 5))) < 1e-5
    assert torch.equal(loaded.empty_prompt_embeds, adapter.empty_prompt_embeds)
    assert loaded.empty_prompt_embeds.shape == (1, PROMPT_LENGTH, TEXT_CHANNELS)
    half = StableSRAdapter.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    assert half.dtype == half.empty_prompt_embeds.dtype == torch.bfloat16
    assert half(LATENTS.bfloat16(), 5).maps["mid_block.resnets.0"][0].dtype == torch.bfloat16


@torch.no_grad()
def test_an_adapter_may_carry_no_empty_prompt(tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_unet(), prompt_length=0)
    assert adapter.empty_prompt_embeds is None
    adapter.save_pretrained(tmp_path)
    assert StableSRAdapter.from_pretrained(tmp_path).empty_prompt_embeds is None


def test_an_adapter_is_made_for_a_unet_that_carries_lora_layers() -> None:
    from peft import LoraConfig

    unet = tiny_unet()
    expected = residual_blocks(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv2"]))
    assert residual_blocks(unet) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types names 1 levels, block_out_channels 2"),
        (
            {"block_out_channels": (16,) * 3, "down_block_types": ("DownBlock2D",) * 3},
            "block_out_channels has 3 levels, the UNet has 2; give one width per level",
        ),
        ({"modulation": "film"}, "modulation='film' is unknown; use 'spade' or 'sft'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_adapter(tiny_unet(), **config)


def test_every_parameter_is_trained() -> None:
    unet = tiny_unet()
    adapter = tiny_adapter(unet).train()
    loss = sum(gamma.square().mean() + beta.square().mean() for gamma, beta in adapter(LATENTS, 5).maps.values())
    loss.backward()
    unused = [
        name for name, parameter in adapter.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_per_block": 2}, "it steers 8 residual blocks, this UNet has 12"),
        ({"block_out_channels": (16, 48)}, "this UNet has 8, and they first differ at .*32, 1.* and .*48, 1"),
        ({"cross_attention_dim": 24}, "its text condition is 16 wide, this UNet's 24"),
    ],
)
def test_an_adapter_of_another_unet_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_adapter(tiny_unet()).save_pretrained(tmp_path)
    adapter = StableSRAdapter.from_pretrained(tmp_path)
    check_adapter(adapter, tiny_unet())
    with pytest.raises(ConfigError, match=f"an adapter of another UNet is given: .*{message}.*; give the adapter"):
        check_adapter(adapter, tiny_unet(**config))
