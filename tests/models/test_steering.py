"""A steerable UNet: the stock one when it has nothing to add, and the formula of SFT where it has."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from stablesr_kit.errors import ConfigError
from stablesr_kit.models.steering import (
    Modulation,
    SFTMaps,
    make_steerable,
    residual_blocks,
    steered_prediction,
)
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
        pytest.param({"mid_block_type": None}, id="no-middle"),
    ],
)
TIMESTEP = torch.tensor([700, 3])
LATENTS = unit_noise(2, 4, 8, 8, seed=1)
TEXT = unit_noise(2, 5, TEXT_CHANNELS, seed=2)


def steerable(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    make_steerable(unet)
    return unet


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
    assert torch.equal(steerable(tiny_unet(**config))(LATENTS, TIMESTEP, TEXT).sample, expected)


@CONFIGS
@torch.no_grad()
def test_an_untrained_sft_adapter_leaves_the_prior_unchanged_to_the_bit(config: dict[str, Any]) -> None:
    unet = tiny_unet(**config)
    adapter = tiny_adapter(unet, modulation="sft")
    expected = unet(LATENTS, TIMESTEP, TEXT).sample
    steered = steerable(unet)
    assert torch.equal(steered(LATENTS, TIMESTEP, TEXT, timestep_cond=adapter(LATENTS, TIMESTEP)).sample, expected)


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
    ours = steerable(tiny_unet(**config))(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 12), (16, 4), (9, 14), (5, 7)])
@torch.no_grad()
def test_latents_need_not_be_square_or_even(height: int, width: int) -> None:
    stock = tiny_unet()
    latents = unit_noise(1, 4, height, width)
    maps = tiny_adapter(stock)(latents, TIMESTEP[:1])
    with modulated(stock, maps):
        expected = stock(latents, TIMESTEP[:1], TEXT[:1]).sample
    ours = steerable(tiny_unet())(latents, TIMESTEP[:1], TEXT[:1], timestep_cond=maps).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_the_unet_stays_the_object_it_was() -> None:
    unet = tiny_unet()
    config, names = dict(unet.config), [name for name, _ in unet.named_modules()]
    parameters, buffers = dict(unet.named_parameters()), dict(unet.named_buffers())
    make_steerable(unet)
    assert type(unet) is UNet2DConditionModel
    assert dict(unet.config) == config
    assert [name for name, _ in unet.named_modules()] == names
    assert list(unet.state_dict()) == [*parameters, *buffers]
    assert all(parameters[name] is parameter for name, parameter in unet.named_parameters())
    attributes = set(vars(unet))
    unet(LATENTS, TIMESTEP, TEXT, timestep_cond=random_maps(unet))
    assert set(vars(unet)) == attributes
    blocks = list(unet.modules())
    make_steerable(unet)
    assert all(one is another for one, another in zip(unet.modules(), blocks, strict=True))


@pytest.mark.parametrize("modulation", ["sft", "spade"])
@torch.no_grad()
def test_guidance_branches_share_one_set_of_maps(modulation: Modulation) -> None:
    unet = steerable(tiny_unet())
    sft = random_maps(unet, modulation=modulation)
    repeated = SFTMaps(modulation, {k: (g.repeat(2, 1, 1, 1), b.repeat(2, 1, 1, 1)) for k, (g, b) in sft.maps.items()})
    batch = torch.cat([LATENTS] * 2)
    text = torch.cat([TEXT, -TEXT])
    shared = unet(batch, 700, text, timestep_cond=sft).sample
    torch.testing.assert_close(shared, unet(batch, 700, text, timestep_cond=repeated).sample, atol=1e-6, rtol=0)
    alone = unet(LATENTS, 700, -TEXT, timestep_cond=sft).sample
    torch.testing.assert_close(shared[2:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("modulation", ["spade", "sft"])
def test_in_place_without_gradients_it_gives_the_same_bits(modulation: Modulation, branches: int) -> None:
    unet = steerable(tiny_unet())
    sft = random_maps(unet, modulation=modulation)
    call = LATENTS.repeat(branches, 1, 1, 1), 500, TEXT.repeat(branches, 1, 1)
    expected = unet(*call, timestep_cond=sft).sample
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(unet(*call, timestep_cond=sft).sample, expected)


@torch.no_grad()
def test_a_batch_with_a_timestep_per_sample_equals_the_samples_alone() -> None:
    unet = steerable(tiny_unet())
    adapter = tiny_adapter(unet)
    together = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=adapter(LATENTS, TIMESTEP)).sample
    for i in range(2):
        x, t, text = LATENTS[i : i + 1], TIMESTEP[i], TEXT[i : i + 1]
        alone = unet(x, t, text, timestep_cond=adapter(x, t)).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for use_checkpointing in (False, True):
        unet = steerable(tiny_unet()).requires_grad_(False)
        adapter = tiny_adapter(unet)
        if use_checkpointing:
            unet.enable_gradient_checkpointing()
            adapter.enable_gradient_checkpointing()
        unet(LATENTS, TIMESTEP, TEXT, timestep_cond=adapter(LATENTS, TIMESTEP)).sample.square().mean().backward()
        assert all(parameter.grad is None for parameter in unet.parameters())
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_unet_and_adapter_compile_into_one_graph_that_serves_every_timestep() -> None:
    unet = steerable(tiny_unet())
    adapter = tiny_adapter(unet)

    def step(latents: Tensor, timestep: Tensor) -> Tensor:
        return unet(latents, timestep, TEXT, timestep_cond=adapter(LATENTS, timestep)).sample

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for timestep in (999, 500, 1):
        at = torch.tensor(timestep)
        torch.testing.assert_close(compiled(LATENTS, at), step(LATENTS, at), atol=1e-6, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_saved_unet_is_a_stock_one(tmp_path: Path) -> None:
    unet = steerable(tiny_unet())
    unet.save_pretrained(tmp_path, variant="test")
    stock, info = UNet2DConditionModel.from_pretrained(tmp_path, variant="test", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert stock.config["_class_name"] == "UNet2DConditionModel"
    sft = random_maps(unet)
    with torch.no_grad():
        expected = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
        reloaded = steerable(stock)(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    torch.testing.assert_close(reloaded, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_copies_and_pickles_take_maps_too() -> None:
    unet = steerable(tiny_unet())
    sft = random_maps(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(twin(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, expected)


@torch.no_grad()
def test_free_u_and_control_net_residuals_work_beside_the_maps() -> None:
    stock = tiny_unet()
    unet = steerable(tiny_unet())
    sft = random_maps(stock)
    control = ControlNetModel.from_unet(stock, conditioning_embedding_out_channels=(8, 8))
    for parameter in control.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    down, mid = control(LATENTS, TIMESTEP, TEXT, unit_noise(2, 3, 16, 16), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    plain = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    for steps in ("control net", "control net and FreeU"):
        if "FreeU" in steps:
            for network in (stock, unet):
                network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with modulated(stock, sft):
            expected = stock(LATENTS, TIMESTEP, TEXT, **residuals).sample
        ours = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft, **residuals).sample
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0, msg=steps)
        assert (ours - plain).abs().max() > 1e-3, steps
        plain = ours


@torch.no_grad()
def test_attention_slicing_does_not_change_the_prediction() -> None:
    unet = steerable(tiny_unet())
    sft = random_maps(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    unet.set_attention_slice("max")
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    torch.testing.assert_close(unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layerwise_casting_stores_unet_and_adapter_in_8_bits_and_keeps_their_norms() -> None:
    unet = steerable(tiny_unet())
    adapter = tiny_adapter(unet)
    expected = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=adapter(LATENTS, TIMESTEP)).sample
    for network in (unet, adapter):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert network.down_blocks[0].resnets[0].conv2.weight.dtype == torch.float8_e4m3fn
        assert network.down_blocks[0].resnets[0].norm2.weight.dtype == torch.float32
        assert network.dtype == torch.float32
    rough = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=adapter(LATENTS, TIMESTEP)).sample
    assert 0 < (rough - expected).abs().max() < 0.2 * expected.abs().max()


@torch.no_grad()
def test_lora_weights_per_block_are_understood() -> None:
    unet = steerable(tiny_unet())
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False)
    unet.add_adapter(config, adapter_name="style")
    sft = random_maps(unet)
    everywhere = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    unet.set_adapters(["style"], [{"down": {"block_0": 0.0}, "mid": 0.0, "up": {"block_1": [0.0, 0.0]}}])
    assert (unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample - everywhere).abs().max() > 1e-3


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


HOOKS = pytest.mark.parametrize(
    "hook",
    ["whole", "sequential", "device_map", "block_level", "leaf_level", "group offload to disk", "on a residual block"],
)


def put_on(unet: UNet2DConditionModel, hook: str, folder: Path) -> None:
    cpu = torch.device("cpu")
    if hook == "whole":
        accelerate.cpu_offload_with_hook(unet, cpu)
    elif hook == "sequential":
        accelerate.cpu_offload(unet, cpu)
    elif hook == "device_map":
        places = {name: "cpu" if name == "time_embedding" else "disk" for name, _ in unet.named_children()}
        accelerate.dispatch_model(unet, places, main_device="cpu", offload_dir=folder)
    elif hook == "on a residual block":
        add_hook_to_module(unet.down_blocks[0].resnets[0], AlignDevicesHook(cpu))
        add_hook_to_module(unet.down_blocks[0].resnets[0], AlignDevicesHook(cpu), append=True)
    else:
        unet.enable_group_offload(
            cpu,
            offload_type="leaf_level" if hook == "leaf_level" else "block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=str(folder) if hook == "group offload to disk" else None,
        )


@HOOKS
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@torch.no_grad()
def test_a_unet_may_have_hooks_before_and_after_and_lose_them(hook: str, before: bool, tmp_path: Path) -> None:
    sft = random_maps(tiny_unet())
    plain = tiny_unet()(LATENTS, TIMESTEP, TEXT).sample
    steered = steerable(tiny_unet())(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    unet = tiny_unet() if before else steerable(tiny_unet())
    put_on(unet, hook, tmp_path)
    make_steerable(unet)
    assert torch.equal(unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, steered)
    assert torch.equal(unet(LATENTS, TIMESTEP, TEXT).sample, plain)
    if hook in ("whole", "sequential", "device_map", "on a residual block"):
        remove_hook_from_submodules(unet)
        assert torch.equal(unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, steered)
        assert torch.equal(unet(LATENTS, TIMESTEP, TEXT).sample, plain)


@torch.no_grad()
def test_a_unet_that_had_hooks_of_every_kind_on_the_modules_that_change_is_steerable() -> None:
    sft = random_maps(tiny_unet())
    expected = steerable(tiny_unet())(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    unet = tiny_unet()
    kept, gone = unet.down_blocks[0].resnets[0], unet.time_embedding
    for module in (kept, gone):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "one")
        HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "two")
        add_hook_to_module(module, AlignDevicesHook())
    remove_hook_from_module(gone)
    gone._diffusers_hook.remove_hook("one")
    make_steerable(unet)
    assert torch.equal(unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, expected)
    remove_hook_from_module(kept)
    kept._diffusers_hook.remove_hook("two")
    kept._diffusers_hook.remove_hook("one")
    assert torch.equal(unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample, expected)


def test_a_residual_block_with_a_forward_of_unknown_origin_is_refused() -> None:
    unet = tiny_unet()
    unet.mid_block.resnets[1].forward = lambda x, _temb: x
    with pytest.raises(ConfigError, match="mid_block.resnets.1 has a forward of its own.*remove it first"):
        make_steerable(unet)


@pytest.mark.parametrize("how", ["whole", "blocks"])
@torch.no_grad()
def test_a_compiled_unet_is_steerable_in_one_graph_and_still_the_stock_one(how: str) -> None:
    stock = tiny_unet()
    sft = random_maps(stock)
    counter = CompileCounter()
    unet: Any = stock
    if how == "whole":
        unet = torch.compile(stock, fullgraph=True, backend=counter)
    else:
        stock.compile_repeated_blocks(fullgraph=True, backend=counter)
    plain = tiny_unet()(LATENTS, TIMESTEP, TEXT).sample
    torch.testing.assert_close(unet(LATENTS, TIMESTEP, TEXT).sample, plain, atol=1e-5, rtol=0)
    make_steerable(unet)
    expected = steerable(tiny_unet())(LATENTS, TIMESTEP, TEXT, timestep_cond=sft).sample
    graphs = counter.frame_count
    for _ in range(2):
        steered = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=random_maps(stock)).sample
        torch.testing.assert_close(steered, expected, atol=1e-5, rtol=0)
    assert counter.frame_count - graphs == (0 if how == "blocks" else 1)
    torch.testing.assert_close(unet(LATENTS, TIMESTEP, TEXT).sample, plain, atol=1e-5, rtol=0)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_latent_consistency_unet_gets_its_guidance_beside_the_maps() -> None:
    stock = tiny_unet(time_cond_proj_dim=6)
    guidance = unit_noise(2, 6)
    sft = random_maps(stock)
    with modulated(stock, sft):
        expected = stock(LATENTS, TIMESTEP, TEXT, timestep_cond=guidance).sample
        without = stock(LATENTS, TIMESTEP, TEXT).sample
    assert (expected - without).abs().max() > 1e-2
    unet = steerable(tiny_unet(time_cond_proj_dim=6))
    assert torch.equal(
        unet(LATENTS, TIMESTEP, TEXT, timestep_cond=guidance).sample,
        stock(LATENTS, TIMESTEP, TEXT, timestep_cond=guidance).sample,
    )
    ours = unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft._replace(timestep_cond=guidance)).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)

    adapter = tiny_adapter(unet)
    ours = steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT, 3.0)
    scale = torch.tensor([2.0, 2.0])
    told = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, embedding_dim=6)
    maps = adapter(LATENTS, 700)._replace(timestep_cond=told)
    torch.testing.assert_close(ours, unet(LATENTS, 700, TEXT, timestep_cond=maps).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_threads_that_share_a_unet_do_not_disturb_each_other() -> None:
    unet = tiny_unet()
    one, two = tiny_adapter(unet), tiny_adapter(unet)
    for layer in two.sft_layers:
        layer.gamma_beta.weight.neg_()
    plain = unet(LATENTS, 700, TEXT).sample
    steered = [steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT) for adapter in (one, two)]
    assert (steered[0] - steered[1]).abs().max() > 0.1
    runs: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: steered_prediction(unet, one, LATENTS, 700, LATENTS, TEXT), steered[0]),
        (lambda: steered_prediction(unet, two, LATENTS, 700, LATENTS, TEXT), steered[1]),
        (lambda: unet(LATENTS, 700, TEXT).sample, plain),  # a stock pipeline
    ]

    def wrong(run: Callable[[], Tensor], expected: Tensor) -> int:
        with torch.no_grad():  # grad mode belongs to a thread
            return sum(not torch.equal(run(), expected) for _ in range(80))

    with ThreadPoolExecutor(len(runs)) as threads:
        assert sum(threads.map(wrong, *zip(*runs, strict=True))) == 0


@torch.no_grad()
def test_lora_is_loaded_and_unloaded_on_the_one_unet() -> None:
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    before = steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT)
    config = LoraConfig(r=2, target_modules=["to_q", "conv1", "conv2", "time_emb_proj"], init_lora_weights=False)
    unet.add_adapter(config, adapter_name="style")
    assert list(unet.peft_config) == ["style"] and unet.active_adapters() == ["style"]
    styled = steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT)
    assert (styled - before).abs().max() > 1e-2
    unet.fuse_lora()
    fused = steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT)
    torch.testing.assert_close(fused, styled, atol=1e-4, rtol=0)
    unet.unfuse_lora()
    unet.disable_adapters()
    torch.testing.assert_close(
        steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT), before, atol=1e-4, rtol=0
    )
    unet.delete_adapters("style")
    unet.unload_lora()
    assert not any("lora" in name for name in unet.state_dict())
    torch.testing.assert_close(
        steered_prediction(unet, adapter, LATENTS, 700, LATENTS, TEXT), before, atol=1e-4, rtol=0
    )


def test_accelerate_keeps_a_residual_block_on_one_device() -> None:
    unet = steerable(tiny_unet())
    places = accelerate.infer_auto_device_map(
        unet, {0: "80KB", "cpu": "10GB"}, no_split_module_classes=unet._no_split_modules
    )
    assert not any(".resnets." in name and name.count(".") > 3 for name in places)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "time_embedding_norm='scale_shift'"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn='silu' is given, expected None"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")}, "resamples"),
        ({"num_class_embeds": 10}, "num_class_embeds=10 is given, expected None"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 32,
            },
            "addition_embed_type='text_time' is given",
        ),
    ],
)
def test_a_unet_of_another_family_is_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steerable(tiny_unet(**config))


@pytest.mark.parametrize("is_complete", [True, False])
@torch.no_grad()
def test_the_maps_are_let_go_after_a_call_even_if_it_fails(is_complete: bool) -> None:
    unet = steerable(tiny_unet())
    sft = random_maps(unet)
    first = weakref.ref(sft.maps["down_blocks.0.resnets.0"][0])
    if is_complete:
        unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft)
    else:
        del sft.maps["mid_block.resnets.0"]
        with pytest.raises(KeyError):
            unet(LATENTS, TIMESTEP, TEXT, timestep_cond=sft)
    del sft
    gc.collect()
    assert first() is None


@torch.no_grad()
def test_sft_is_the_formula_on_a_single_block() -> None:
    unet = steerable(tiny_unet())
    block = unet.down_blocks[0].resnets[0]
    x, emb = unit_noise(1, 16, 4, 4), unit_noise(1, 64)
    gamma, beta = unit_noise(1, 16, 4, 4, seed=3), unit_noise(1, 16, 4, 4, seed=4)
    before_skip = block(x, emb) - x
    modulated_block = block(x, (emb, SFTMaps("sft", {block.sft_name: (gamma, beta)})))
    torch.testing.assert_close(modulated_block, before_skip * (1 + gamma) + beta + x, atol=1e-5, rtol=0)
    assert F.mse_loss(modulated_block, block(x, emb)) > 0.1
