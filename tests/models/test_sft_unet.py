"""The SFT UNet: the stock UNet when it has nothing to add, and the formula of SFT where it has."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from stablesr_kit import SFTUNet2DConditionModel
from stablesr_kit.models.sft_unet import Modulation, SFTMaps, residual_blocks
from tests.helpers.tiny import SD1, SD2, TEXT_CHANNELS, tiny_adapter, tiny_unet, unit_noise

CONFIGS = pytest.mark.parametrize(
    "config",
    [
        pytest.param(SD1, id="SD1"),
        pytest.param(SD2, id="SD2"),
        pytest.param({"layers_per_block": 2, "block_out_channels": (8, 24)}, id="two-blocks"),
        pytest.param(
            {
                "block_out_channels": (8, 16, 16),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "attention_head_dim": 2,
            },
            id="three-levels",
        ),
    ],
)
TIMESTEP = torch.tensor([700, 3])
LATENTS = unit_noise(2, 4, 8, 8, seed=1)
TEXT = unit_noise(2, 5, TEXT_CHANNELS, seed=2)


def random_maps(
    unet: UNet2DConditionModel, batch: int = 2, height: int = 8, width: int = 8, modulation: Modulation = "sft"
) -> SFTMaps:
    """Maps of the sizes that the levels have; odd sizes are rounded up on the way down."""
    maps = {}
    for i, (name, channels, level) in enumerate(residual_blocks(unet)):
        size = (batch, channels, -(-height // 2**level), -(-width // 2**level))
        maps[name] = (0.3 * unit_noise(*size, seed=2 * i), 0.3 * unit_noise(*size, seed=2 * i + 1))
    return SFTMaps(modulation, maps)


@contextmanager
def modulated(unet: UNet2DConditionModel, sft: SFTMaps) -> Iterator[None]:
    """A stock UNet to which the maps are applied by hooks: the formula of SFT, in another place than ours."""

    def hook(block: ResnetBlock2D, name: str) -> Any:
        def apply(_conv: Any, _args: Any, h: Tensor) -> Tensor:
            gamma, beta = sft.maps[name]
            if sft.modulation == "spade":
                grouped = h.unflatten(1, (block.norm2.num_groups, -1))
                mean = grouped.mean((2, 3, 4), keepdim=True)
                variance = grouped.var((2, 3, 4), correction=0, keepdim=True)
                h = ((grouped - mean) / (variance + block.norm2.eps).sqrt()).flatten(1, 2)
            return h * (1 + gamma) + beta

        return block.conv2.register_forward_hook(apply)

    blocks = [(n, m) for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    handles = [hook(block, name) for name, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@CONFIGS
@torch.no_grad()
def test_without_maps_it_is_the_stock_unet_to_the_bit(config: dict[str, Any]) -> None:
    expected = tiny_unet(**config)(LATENTS, TIMESTEP, TEXT).sample
    assert torch.equal(SFTUNet2DConditionModel.from_unet(tiny_unet(**config))(LATENTS, TIMESTEP, TEXT).sample, expected)


@CONFIGS
@torch.no_grad()
def test_an_untrained_sft_adapter_leaves_the_prior_unchanged_to_the_bit(config: dict[str, Any]) -> None:
    unet = tiny_unet(**config)
    adapter = tiny_adapter(unet, modulation="sft")
    expected = unet(LATENTS, TIMESTEP, TEXT).sample
    steered = SFTUNet2DConditionModel.from_unet(unet)
    assert torch.equal(steered(LATENTS, TIMESTEP, TEXT, sft=adapter(LATENTS, TIMESTEP)).sample, expected)


@CONFIGS
@pytest.mark.parametrize("modulation", ["sft", "spade"])
@torch.no_grad()
def test_maps_act_between_the_second_convolution_and_the_skip_of_every_block(
    config: dict[str, Any], modulation: Modulation
) -> None:
    stock = tiny_unet(**config)
    sft = random_maps(stock, modulation=modulation)
    with modulated(stock, sft):
        expected = stock(LATENTS, TIMESTEP, TEXT).sample
    assert (expected - stock(LATENTS, TIMESTEP, TEXT).sample).abs().max() > 0.1
    ours = SFTUNet2DConditionModel.from_unet(tiny_unet(**config))(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 12), (16, 4), (9, 14), (5, 7)])
@torch.no_grad()
def test_latents_need_not_be_square_or_even(height: int, width: int) -> None:
    stock = tiny_unet()
    latents = unit_noise(1, 4, height, width)
    maps = tiny_adapter(stock)(latents, TIMESTEP[:1])
    with modulated(stock, maps):
        expected = stock(latents, TIMESTEP[:1], TEXT[:1]).sample
    ours = SFTUNet2DConditionModel.from_unet(tiny_unet())(latents, TIMESTEP[:1], TEXT[:1], sft=maps).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_from_unet_shares_every_parameter_and_leaves_the_original_as_it_was() -> None:
    stock = tiny_unet()
    with torch.no_grad():
        before = stock(LATENTS, TIMESTEP, TEXT).sample
    steered = SFTUNet2DConditionModel.from_unet(stock)
    ours, theirs = dict(steered.named_parameters()), dict(stock.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert dict(steered.config) == dict(stock.config)
    assert type(stock) is UNet2DConditionModel and "time_embed_act" not in dict(stock.named_children())
    with torch.no_grad():
        steered(LATENTS, TIMESTEP, TEXT, sft=random_maps(stock))
        assert torch.equal(stock(LATENTS, TIMESTEP, TEXT).sample, before)
    assert SFTUNet2DConditionModel.from_unet(steered) is steered


@pytest.mark.parametrize("modulation", ["sft", "spade"])
@torch.no_grad()
def test_guidance_branches_share_one_set_of_maps(modulation: Modulation) -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    sft = random_maps(unet, modulation=modulation)
    repeated = SFTMaps(modulation, {k: (g.repeat(2, 1, 1, 1), b.repeat(2, 1, 1, 1)) for k, (g, b) in sft.maps.items()})
    batch = torch.cat([LATENTS] * 2)
    text = torch.cat([TEXT, -TEXT])
    shared = unet(batch, 700, text, sft=sft).sample
    torch.testing.assert_close(shared, unet(batch, 700, text, sft=repeated).sample, atol=1e-6, rtol=0)
    alone = unet(LATENTS, 700, -TEXT, sft=sft).sample
    torch.testing.assert_close(shared[2:], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_batch_with_a_timestep_per_sample_equals_the_samples_alone() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    adapter = tiny_adapter(unet)
    together = unet(LATENTS, TIMESTEP, TEXT, sft=adapter(LATENTS, TIMESTEP)).sample
    for i in range(2):
        x, t, text = LATENTS[i : i + 1], TIMESTEP[i], TEXT[i : i + 1]
        alone = unet(x, t, text, sft=adapter(x, t)).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for use_checkpointing in (False, True):
        unet = SFTUNet2DConditionModel.from_unet(tiny_unet()).requires_grad_(False)
        adapter = tiny_adapter(unet)
        if use_checkpointing:
            unet.enable_gradient_checkpointing()
            adapter.enable_gradient_checkpointing()
        unet(LATENTS, TIMESTEP, TEXT, sft=adapter(LATENTS, TIMESTEP)).sample.square().mean().backward()
        assert all(parameter.grad is None for parameter in unet.parameters())
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_unet_and_adapter_compile_into_one_graph_that_serves_every_timestep() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    adapter = tiny_adapter(unet)

    def step(latents: Tensor, timestep: Tensor) -> Tensor:
        return unet(latents, timestep, TEXT, sft=adapter(LATENTS, timestep)).sample

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for timestep in (999, 500, 1):
        at = torch.tensor(timestep)
        torch.testing.assert_close(compiled(LATENTS, at), step(LATENTS, at), atol=1e-6, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_saved_unet_is_a_stock_one(tmp_path: Path) -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    unet.save_pretrained(tmp_path, variant="test")
    stock, info = UNet2DConditionModel.from_pretrained(tmp_path, variant="test", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert stock.config["_class_name"] == "UNet2DConditionModel"
    again = SFTUNet2DConditionModel.from_pretrained(tmp_path, variant="test", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    sft = random_maps(unet)
    with torch.no_grad():
        expected = unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample
        reloaded = SFTUNet2DConditionModel.from_unet(stock)(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    torch.testing.assert_close(reloaded, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_copies_and_pickles_take_maps_too() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    sft = random_maps(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(twin(LATENTS, TIMESTEP, TEXT, sft=sft).sample, expected)


@torch.no_grad()
def test_free_u_and_control_net_residuals_work_beside_the_maps() -> None:
    stock = tiny_unet()
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    sft = random_maps(stock)
    control = ControlNetModel.from_unet(stock, conditioning_embedding_out_channels=(8, 8))
    for parameter in control.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    down, mid = control(LATENTS, TIMESTEP, TEXT, unit_noise(2, 3, 16, 16), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    plain = unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    for steps in ("control net", "control net and FreeU"):
        if "FreeU" in steps:
            for network in (stock, unet):
                network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with modulated(stock, sft):
            expected = stock(LATENTS, TIMESTEP, TEXT, **residuals).sample
        ours = unet(LATENTS, TIMESTEP, TEXT, sft=sft, **residuals).sample
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0, msg=steps)
        assert (ours - plain).abs().max() > 1e-3, steps
        plain = ours


@torch.no_grad()
def test_attention_slicing_does_not_change_the_prediction() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    sft = random_maps(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    unet.set_attention_slice("max")
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    torch.testing.assert_close(unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layerwise_casting_stores_unet_and_adapter_in_8_bits_and_keeps_their_norms() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    adapter = tiny_adapter(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, sft=adapter(LATENTS, TIMESTEP)).sample
    for network in (unet, adapter):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert network.down_blocks[0].resnets[0].conv2.weight.dtype == torch.float8_e4m3fn
        assert network.down_blocks[0].resnets[0].norm2.weight.dtype == torch.float32
        assert network.dtype == torch.float32
    rough = unet(LATENTS, TIMESTEP, TEXT, sft=adapter(LATENTS, TIMESTEP)).sample
    assert 0 < (rough - expected).abs().max() < 0.2 * expected.abs().max()


@torch.no_grad()
def test_lora_weights_per_block_are_understood() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False)
    unet.add_adapter(config, adapter_name="style")
    sft = random_maps(unet)
    everywhere = unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    unet.set_adapters(["style"], [{"down": {"block_0": 0.0}, "mid": 0.0, "up": {"block_1": [0.0, 0.0]}}])
    assert (unet(LATENTS, TIMESTEP, TEXT, sft=sft).sample - everywhere).abs().max() > 1e-3


def test_residual_blocks_names_every_block_of_the_unet_with_its_width_and_level() -> None:
    unet = tiny_unet(layers_per_block=2, block_out_channels=(8, 24))
    sizes = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_hook(lambda _m, _a, h, name=name: sizes.update({name: tuple(h.shape)}))
    with torch.no_grad():
        unet(LATENTS, TIMESTEP, TEXT)
    listed = residual_blocks(unet)
    assert {name: (2, width, 8 // 2**level, 8 // 2**level) for name, width, level in listed} == sizes


@pytest.mark.parametrize("hook", ["accelerate", "group offloading", "torch.compile"])
def test_a_unet_with_hooks_on_its_forward_is_refused(hook: str) -> None:
    unet = tiny_unet()
    if hook == "accelerate":
        accelerate.cpu_offload_with_hook(unet, torch.device("cpu"))
    elif hook == "group offloading":
        unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    else:
        unet = torch.compile(unet)
    with pytest.raises(ValueError, match="compiled or has hooks.*; give the plain UNet"):
        SFTUNet2DConditionModel.from_unet(unet)


@torch.no_grad()
def test_a_unet_compiled_in_place_is_taken_without_its_compiled_forward() -> None:
    stock = tiny_unet()
    stock.compile(backend="eager")
    sft = random_maps(stock)
    expected = SFTUNet2DConditionModel.from_unet(tiny_unet())(LATENTS, TIMESTEP, TEXT, sft=sft).sample
    assert torch.equal(SFTUNet2DConditionModel.from_unet(stock)(LATENTS, TIMESTEP, TEXT, sft=sft).sample, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "time_embedding_norm='scale_shift'"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn='silu' is given, expected None"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")}, "resamples"),
    ],
)
def test_a_unet_of_another_family_is_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTUNet2DConditionModel.from_unet(tiny_unet(**config))


@pytest.mark.parametrize("is_complete", [True, False])
@torch.no_grad()
def test_the_maps_are_let_go_after_a_call_even_if_it_fails(is_complete: bool) -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    sft = random_maps(unet)
    first = weakref.ref(sft.maps["down_blocks.0.resnets.0"][0])
    if is_complete:
        unet(LATENTS, TIMESTEP, TEXT, sft=sft)
    else:
        del sft.maps["mid_block.resnets.0"]
        with pytest.raises(KeyError):
            unet(LATENTS, TIMESTEP, TEXT, sft=sft)
    del sft
    gc.collect()
    assert first() is None


@torch.no_grad()
def test_sft_is_the_formula_on_a_single_block() -> None:
    unet = SFTUNet2DConditionModel.from_unet(tiny_unet())
    block = unet.down_blocks[0].resnets[0]
    x, emb = unit_noise(1, 16, 4, 4), unit_noise(1, 64)
    gamma, beta = unit_noise(1, 16, 4, 4, seed=3), unit_noise(1, 16, 4, 4, seed=4)
    before_skip = block(x, emb) - x
    modulated_block = block(x, (emb, SFTMaps("sft", {block.sft_name: (gamma, beta)})))
    torch.testing.assert_close(modulated_block, before_skip * (1 + gamma) + beta + x, atol=1e-5, rtol=0)
    assert F.mse_loss(modulated_block, block(x, emb)) > 0.1
