"""Offloading, slicing, layouts and precisions."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from torch import nn

from stablesr_kit import StableSRPipeline
from stablesr_kit.models.execution import to_channels_last
from tests.helpers.pipeline_runs import differs, run, same
from tests.helpers.tiny import tiny_components, tiny_pipeline


def test_attention_slicing_and_channels_last_do_not_change_the_result() -> None:
    pipeline = tiny_pipeline(with_text=False)
    expected = run(pipeline)
    pipeline.enable_attention_slicing("max")
    assert any("Sliced" in type(processor).__name__ for processor in pipeline.unet.attn_processors.values())
    same(run(pipeline), expected)
    pipeline.disable_attention_slicing()
    for network in (pipeline.vae, pipeline.unet, pipeline.adapter, pipeline.cfw):
        network.to(memory_format=torch.channels_last)
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    same(run(pipeline), expected)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_the_xformers_switch_says_what_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        tiny_pipeline(with_text=False).enable_xformers_memory_efficient_attention()


def test_model_offloading_brings_every_network_to_the_device_before_it_is_used() -> None:
    pipeline = tiny_pipeline()
    expected = run(pipeline, prompt="cat")
    pipeline.enable_model_cpu_offload(device="cpu")
    order: list[str] = []
    for name, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            assert isinstance(network._hf_hook, CpuOffload), name

            def note(module: Any, *args: Any, name: str = name, hook: Any = network._hf_hook, **kwargs: Any) -> Any:
                order.append(name)
                return type(hook).pre_forward(hook, module, *args, **kwargs)

            network._hf_hook.pre_forward = note
    same(run(pipeline, prompt="cat"), expected)
    assert order == ["text_encoder", "vae", *["adapter", "unet"] * 2, "vae", "cfw", "cfw"]
    for name, network in pipeline.components.items():  # freed, and set up for the next call
        if isinstance(network, nn.Module):
            assert isinstance(network._hf_hook, CpuOffload) and "pre_forward" not in vars(network._hf_hook), name


def test_offloading_leaf_by_leaf_does_not_change_the_result(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    expected = run(pipeline, prompt="cat")
    cpu = torch.device("cpu")
    for name in ("vae", "unet", "adapter", "cfw"):
        network = getattr(pipeline, name)
        folder = str(tmp_path / name)
        network.enable_group_offload(cpu, cpu, offload_type="leaf_level", offload_to_disk_path=folder)
        assert any(tmp_path.joinpath(name).iterdir())
    same(run(pipeline, prompt="cat"), expected)


@torch.no_grad()
def test_the_prompt_goes_to_the_device_asked_for_wherever_the_text_encoder_rests() -> None:
    pipeline = tiny_pipeline()
    expected, _ = pipeline.encode_prompt("cat", torch.device("cpu"), 1, False)
    for leaf in pipeline.text_encoder.modules():  # as sequential offloading: a leaf has weights while it runs
        weights = {name: weight for name, weight in leaf._parameters.items() if weight is not None}
        resting = {name: nn.Parameter(weight.to("meta")) for name, weight in weights.items()}
        leaf._parameters.update(resting)
        leaf.register_forward_pre_hook(lambda m, _a, w=weights: m._parameters.update(w))
        leaf.register_forward_hook(lambda m, _a, _o, r=resting: m._parameters.update(r))
    assert pipeline.text_encoder.device == torch.device("meta")
    embeds, _ = pipeline.encode_prompt("cat", torch.device("cpu"), 1, False)
    same(embeds, expected)


def test_layerwise_casting_of_unet_and_adapter_runs() -> None:
    pipeline = tiny_pipeline(with_text=False).to(torch.bfloat16)
    expected = run(pipeline)
    for network in (pipeline.unet, pipeline.adapter):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    restored = run(pipeline)
    assert torch.isfinite(restored).all() and differs(restored, expected, by=0)


def test_a_half_precision_autoencoder_runs_in_float32_and_is_given_back() -> None:
    expected = run(tiny_pipeline(with_text=False))
    pipeline = tiny_pipeline(with_text=False).to(torch.float16)
    pipeline.cfw.to(torch.bfloat16)
    assert pipeline.vae.config.force_upcast
    seen = set()
    for network in (pipeline.vae.encoder.conv_in, pipeline.vae.decoder.conv_in, next(pipeline.cfw.children())):
        for convolution in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            convolution.register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    restored = run(pipeline)
    assert seen == {torch.float32}
    assert (pipeline.vae.dtype, pipeline.cfw.dtype, pipeline.unet.dtype) == (
        torch.float16,
        torch.bfloat16,
        torch.float16,
    )
    assert restored.dtype == torch.float32 and not differs(restored, expected, by=0.1)
    pipeline.vae.register_to_config(force_upcast=False)
    seen.clear()
    run(pipeline)
    assert torch.float32 not in seen


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_a_result_that_is_not_finite_is_an_error_and_not_a_black_picture(w: float) -> None:
    pipeline = tiny_pipeline(with_text=False).to(torch.float16)
    pipeline.vae.decoder.conv_out.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="not finite, computed in torch.float16.*; load the pipeline in"):
        run(pipeline, w=w)
    assert pipeline.vae.dtype == torch.float16


def test_networks_of_different_precision_work_together() -> None:
    components = tiny_components(with_text=False)
    components["unet"].to(torch.bfloat16)
    pipeline = StableSRPipeline(**components, default_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    assert not differs(run(pipeline), run(tiny_pipeline(with_text=False)), by=0.2)


def test_components_offloaded_to_one_folder_restore_the_same(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(with_text=False)
    expected = run(pipeline)
    for network in (pipeline.unet, pipeline.vae):
        to_channels_last(network)
    pipeline.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path), exclude_modules="cfw"
    )
    assert len(list(tmp_path.iterdir())) == 3
    same(run(pipeline), expected)
