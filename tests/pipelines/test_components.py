"""What users of diffusers look for: IP adapters, strength, schedulers that fit, LoRAs that apply, true refusals."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from stablesr_kit import SpacedDDPMScheduler, StableSRAdapter, StableSRPipeline, Tiling
from stablesr_kit.errors import ConfigError, ModelNotFoundError
from tests.helpers.pipeline_runs import PICTURE, differs, run, same
from tests.helpers.tiny import (
    TEXT_CHANNELS,
    tiny_adapter,
    tiny_components,
    tiny_picture,
    tiny_pipeline,
    tiny_unet,
    unit_noise,
)

IMAGE_CHANNELS = 8


def ip_adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP adapter for this UNet, in the layout of the published ones."""
    layers: dict[str, Tensor] = {}
    for index, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            block = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                weight = unit_noise(block.inner_dim, TEXT_CHANNELS, seed=index)
                layers[f"{index}.to_{part}_ip.weight"] = weight
        assert processor is not None
    projection = {
        "proj.weight": unit_noise(4 * TEXT_CHANNELS, IMAGE_CHANNELS),
        "proj.bias": torch.zeros(4 * TEXT_CHANNELS),
        "norm.weight": torch.ones(TEXT_CHANNELS),
        "norm.bias": torch.zeros(TEXT_CHANNELS),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def with_ip_adapter(**components: Any) -> StableSRPipeline:
    pipeline = tiny_pipeline(**components)
    pipeline.unet._load_ip_adapter_weights([ip_adapter(pipeline.unet)])
    return pipeline


def image_parts() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=IMAGE_CHANNELS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(config).eval()
    size = {"height": 16, "width": 16}
    return {
        "image_encoder": encoder,
        "feature_extractor": CLIPImageProcessor(size=size, crop_size=size),
    }


def test_an_ip_adapter_shows_the_unet_a_picture() -> None:
    pipeline = with_ip_adapter(**image_parts())
    shown = {"ip_adapter_image": (tiny_picture(20, 24)[0].permute(1, 2, 0) * 255).byte().numpy()}
    pipeline.set_ip_adapter_scale(0.0)
    plain = run(pipeline, **shown)
    same(plain, run(tiny_pipeline()), atol=1e-4)
    pipeline.set_ip_adapter_scale(1.0)
    styled = run(pipeline, **shown)
    assert differs(styled, plain, by=1e-4)
    with torch.no_grad():
        cpu = torch.device("cpu")
        embeds = pipeline.prepare_ip_adapter_image_embeds(shown["ip_adapter_image"], None, cpu, 1, False)
    assert [tuple(one.shape) for one in embeds] == [(1, 1, IMAGE_CHANNELS)]
    same(run(pipeline, ip_adapter_image_embeds=embeds), styled)


def test_embeddings_of_pictures_go_with_guidance_with_batches_and_with_tiles() -> None:
    pipeline = with_ip_adapter()
    embeds = [unit_noise(2, 1, IMAGE_CHANNELS)]  # of no picture, and of one
    guided = {"guidance_scale": 3.0, "ip_adapter_image_embeds": embeds, "prompt": "cat"}
    picture = tiny_picture(18, 25)
    one = run(pipeline, picture, **guided)
    assert differs(one, run(pipeline, picture, **{**guided, "ip_adapter_image_embeds": [embeds[0].flip(0)]}), by=1e-5)
    both = run(pipeline, torch.cat([picture, picture]), generator=[torch.Generator().manual_seed(0)] * 2, **guided)
    assert both.shape[0] == 2
    tiles = {"tiling": Tiling(tile_px=48, overlap_px=16, vae_tile_px=512)}
    assert torch.isfinite(run(pipeline, picture, **guided, **tiles)).all()
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}
    with pytest.raises(ValueError, match="ip_adapter_masks are of the whole picture; give tiling=Tiling"):
        run(pipeline, picture, **guided, **tiles, **masks)


def test_image_prompts_that_cannot_be_shown_are_refused_in_one_line() -> None:
    embeds = [unit_noise(1, 1, IMAGE_CHANNELS)]
    with pytest.raises(ValueError, match="needs an IP adapter; load one with load_ip_adapter"):
        run(tiny_pipeline(), ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match="an IP adapter is loaded; give ip_adapter_image or"):
        run(with_ip_adapter())
    with pytest.raises(ValueError, match="needs the components image_encoder and feature_extractor"):
        run(with_ip_adapter(), ip_adapter_image=PICTURE)
    with pytest.raises(ValueError, match="ip_adapter_image and ip_adapter_image_embeds exclude each other"):
        run(with_ip_adapter(), ip_adapter_image=PICTURE, ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match="must have same length as the number of IP Adapters. Got 2 images and 1"):
        run(with_ip_adapter(**image_parts()), ip_adapter_image=[PICTURE, PICTURE])


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 5), (0.6, 3), (0.2, 1), (0.1, 0), (0.0, 0)])
def test_strength_is_the_share_of_the_steps_that_are_run(strength: float, steps: int) -> None:
    for kind, visits in ((SpacedDDPMScheduler, 1), (HeunDiscreteScheduler, 2)):
        pipeline = tiny_pipeline(with_text=False)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        restored = run(pipeline, num_inference_steps=5, strength=strength)
        assert torch.isfinite(restored).all()
        assert pipeline.num_timesteps in (steps * visits, max(steps * visits - 1, 0))  # Heun ends with one visit
        if strength == 1:
            assert torch.equal(restored, run(pipeline, num_inference_steps=5))


def test_a_start_may_be_any_whole_number() -> None:
    pipeline = tiny_pipeline(with_text=False)
    expected = run(pipeline, num_inference_steps=4, start=500)
    assert torch.equal(run(pipeline, num_inference_steps=np.int64(4), start=np.int64(500)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "4"}, "scale='4' is given, expected a positive number"),
        ({"num_inference_steps": 4.0}, "num_inference_steps=4.0 is given, expected at least 1, a whole number"),
        ({"w": "0.5"}, "w='0.5' is given, expected a number"),
        ({"guidance_scale": "3"}, "guidance_scale='3' is given, expected a number"),
        ({"start": 2.5}, "start=2.5 is given, expected 'lq', 'noise' or a timestep"),
        ({"strength": 1.2}, "strength=1.2 is given, expected 0"),
        ({"strength": 0.5, "start": "noise"}, "strength and start exclude each other"),
        ({"image": "a cat", "prompt": PICTURE}, "image is a text and prompt a picture; the picture comes first"),
        ({"prompt": PICTURE}, "a prompt of type Tensor is given, expected text"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tiny_pipeline()(**{"image": PICTURE, **arguments})
    assert "\n" not in str(error.value)


def test_no_adapter_and_one_of_another_unet_are_refused_in_one_line() -> None:
    pipeline = tiny_pipeline(with_text=False)
    with pytest.raises(ConfigError, match="an adapter of another UNet is given") as error:
        StableSRPipeline(**{**pipeline.components, "adapter": tiny_adapter(tiny_unet(layers_per_block=2))})
    assert "\n" not in str(error.value)
    pipeline.adapter = None
    with pytest.raises(ValueError, match="adapter=None is given, expected a StableSRAdapter; load one"):
        run(pipeline)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        IPNDMScheduler(),
        DDIMInverseScheduler(),
        DPMSolverMultistepInverseScheduler(),
        ScoreSdeVeScheduler(),
        RePaintScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused_by_name(scheduler: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.scheduler = scheduler
    with pytest.raises(ConfigError, match=f"^{type(scheduler).__name__} cannot sample from this model") as error:
        run(pipeline)
    assert "\n" not in str(error.value)


def test_a_scheduler_set_up_for_another_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline(with_text=False)
    own = pipeline.scheduler.config
    for kind in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        pipeline.scheduler = kind.from_config(own)
        run(pipeline)
    assert not caplog.messages
    for other in (EulerDiscreteScheduler(), DDIMScheduler.from_config(own, prediction_type="v_prediction")):
        pipeline.scheduler = other
        run(pipeline)
        (message,) = caplog.messages
        assert message.startswith(f"the scheduler {type(other).__name__} was set up for another model")
        caplog.clear()
    tiny_pipeline(with_text=False).save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path, scheduler=EulerDiscreteScheduler())
    loaded.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING):
        run(loaded, num_inference_steps=2)
    assert any("was set up for another model" in message for message in caplog.messages)


def lora(pipeline: Any, targets: dict[str, list[str]]) -> dict[str, Tensor]:
    """Random LoRA weights for some layers, by the keys of diffusers."""
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, modules in targets.items():
            network = getattr(pipeline, name)
            network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False))
            found |= {f"{name}.{key}": value for key, value in get_peft_model_state_dict(network).items()}
    return found


def test_a_lora_that_does_not_apply_is_refused_and_a_part_that_does_not_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = lora(tiny_pipeline(), {"unet": ["to_q"], "text_encoder": ["q_proj"]})
    of_text = {key: value for key, value in weights.items() if key.startswith("text_encoder")}
    without_text = tiny_pipeline(with_text=False)
    with pytest.raises(ConfigError, match="none of this LoRA's keys belongs to .*, and this pipeline has no text enc"):
        without_text.load_lora_weights(of_text)
    caplog.clear()
    base = run(without_text)
    without_text.load_lora_weights(weights)
    assert "this LoRA's layers of the text encoder are left out" in caplog.text
    assert differs(run(without_text), base, by=1e-5)
    foreign = {f"unet.nowhere.{key.removeprefix('unet.')}": value for key, value in weights.items() if "unet" in key}
    other = {f"transformer.{key}": value for key, value in foreign.items()}
    for useless in (foreign, other):
        with pytest.raises(ValueError):  # peft names the layers it looked for, or we say that there are none
            tiny_pipeline().load_lora_weights(useless)


def test_a_plain_stable_diffusion_folder_says_what_it_lacks(tmp_path: Path) -> None:
    components = tiny_components()
    parts = {name: components[name] for name in ("vae", "unet", "text_encoder", "tokenizer")}
    scheduler = DDIMScheduler.from_config(components["scheduler"].config, steps_offset=1)
    plain = StableDiffusionPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plain.save_pretrained(tmp_path / "sd")
    with pytest.raises(ModelNotFoundError, match="is a StableDiffusionPipeline without an adapter") as error:
        StableSRPipeline.from_pretrained(tmp_path / "sd")
    assert "\n" not in str(error.value)
    components["adapter"].save_pretrained(tmp_path / "adapter")
    adapter = StableSRAdapter.from_pretrained(tmp_path / "adapter")
    pipeline = StableSRPipeline.from_pretrained(tmp_path / "sd", adapter=adapter, default_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.isfinite(run(pipeline, prompt="cat")).all()
