"""How a pipeline is saved, loaded, shared and built from others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from stablesr_kit import SpacedDDPMScheduler, StableSRPipeline
from stablesr_kit.errors import ModelNotFoundError
from tests.helpers.pipeline_runs import differs, run, same
from tests.helpers.tiny import (
    seeded,
    tiny_adapter,
    tiny_components,
    tiny_picture,
    tiny_pipeline,
    tiny_unet,
)


def test_a_saved_pipeline_restores_the_same(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(
        default_steps=3, min_size_px=24, scheduler=SpacedDDPMScheduler(timestep_spacing="trailing")
    )
    pipeline.save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.default_steps, loaded.config.min_size_px) == (3, 24)
    assert isinstance(loaded.scheduler, SpacedDDPMScheduler)
    same(run(loaded, prompt="cat"), run(pipeline, prompt="cat"), atol=1e-4)  # weights lie elsewhere in memory


def test_components_that_are_none_stay_none(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(with_text=False, cfw=None)
    pipeline.save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(str(tmp_path))
    assert loaded.cfw is None and loaded.text_encoder is None and loaded.tokenizer is None
    assert set(loaded.components) == set(pipeline.components)
    assert loaded.image_encoder is None and loaded.feature_extractor is None
    loaded.set_progress_bar_config(disable=True)
    same(run(loaded), run(pipeline), atol=1e-4)  # weights lie elsewhere in memory


def test_variants_and_dtypes_are_loaded_as_asked(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "adapter/diffusion_pytorch_model.fp16.safetensors").is_file()
    with pytest.raises((ValueError, OSError)):
        StableSRPipeline.from_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    networks = [component for component in loaded.components.values() if isinstance(component, nn.Module)]
    assert {network.dtype for network in networks} == {torch.bfloat16} and len(networks) == 5
    mixed = {"unet": torch.bfloat16, "default": torch.float32}
    loaded = StableSRPipeline.from_pretrained(tmp_path, variant="fp16", dtype=mixed)
    assert (loaded.unet.dtype, loaded.adapter.dtype, loaded.cfw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert torch.isfinite(run(loaded, prompt="cat")).all()


def test_a_component_can_be_replaced_while_loading(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None, cfw=None)
    assert loaded.text_encoder is None and loaded.cfw is None


def test_the_stock_pipeline_loads_our_folder(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((tmp_path / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, safety_checker=None)
    assert type(stock.unet) is UNet2DConditionModel
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stock.unet.state_dict().items())


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no_such_folder/deeper/model", "not a name"])
def test_an_unknown_model_name_is_one_line(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="neither an embedded model.*check the name") as error:
        StableSRPipeline.from_pretrained(name, local_files_only=True)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_folder_or_file_that_is_no_pipeline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no model_index.json.*make one with `stablesr convert`"):
        StableSRPipeline.from_pretrained(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ModelNotFoundError, match="is a file, expected a pipeline folder; make one with"):
        StableSRPipeline.from_pretrained(tmp_path / "model.ckpt")


def stock_pipeline(kind: Any, components: dict[str, Any]) -> Any:
    shared = {key: components[key] for key in ("vae", "unet", "text_encoder", "tokenizer")}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    stock = kind(**shared, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                 requires_safety_checker=False)  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    return stock


def stock_image(pipeline: Any) -> Tensor:
    image = {"image": tiny_picture(16, 16)} if "image" in pipeline.__call__.__annotations__ else {}
    size = {} if image else {"height": 16, "width": 16}
    return pipeline("cat", **image, **size, num_inference_steps=2, generator=seeded(0), output_type="pt").images


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_any_stable_diffusion_pipeline_becomes_ours_and_back(kind: Any) -> None:
    components = tiny_components()
    stock = stock_pipeline(kind, components)
    assert type(stock.unet) is UNet2DConditionModel
    before = stock_image(stock)
    ours = StableSRPipeline.from_pipe(stock, adapter=components["adapter"], cfw=components["cfw"], default_steps=2)
    ours.set_progress_bar_config(disable=True)
    expected = tiny_pipeline(scheduler=DDIMScheduler.from_config(stock.scheduler.config))
    same(run(ours, prompt="cat"), run(expected, prompt="cat"))
    assert ours.vae is stock.vae and ours.text_encoder is stock.text_encoder
    assert torch.equal(stock_image(stock), before)

    again = kind.from_pipe(ours, safety_checker=None, feature_extractor=None)
    again.set_progress_bar_config(disable=True)
    assert again.unet is ours.unet is stock.unet
    assert again.config.requires_safety_checker is False
    assert torch.equal(stock_image(again), before)


def test_two_pipelines_share_a_unet_and_do_not_disturb_each_other() -> None:
    one = tiny_pipeline(with_text=False)
    other_adapter = tiny_adapter(tiny_unet())
    for layer in other_adapter.sft_layers:
        layer.gamma_beta.weight.data.neg_()
    shared = {**one.components, "scheduler": SpacedDDPMScheduler(), "adapter": other_adapter}
    two = StableSRPipeline(**shared, default_steps=2)
    two.set_progress_bar_config(disable=True)
    assert two.unet is one.unet
    first, second = run(one), run(two)
    assert differs(first, second)

    def run_the_other(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert torch.equal(run(two), second)
        return tensors

    assert torch.equal(run(one, callback_on_step_end=run_the_other), first)


def test_a_unet_put_in_later_takes_maps_and_is_saved_as_the_stock_one(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(with_text=False)
    expected = run(pipeline)
    pipeline.unet = tiny_unet()
    assert type(pipeline.unet) is UNet2DConditionModel
    assert torch.equal(run(pipeline), expected)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert tuple(pipeline.config.unet) == ("diffusers", "UNet2DConditionModel")
    pipeline.save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    same(run(loaded), expected, atol=1e-4)  # weights lie elsewhere in memory
