"""Pictures in one step: sizes, strengths, texts, tiles, and folders, with real networks at tiny size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from stablesr_kit import Job, OneStepPipeline, Tiling
from stablesr_kit.models.default_prompt import DefaultPrompt
from stablesr_kit.models.noise_predictor import NoisePredictor
from tests.helpers.tiny import (
    seeded,
    tiny_picture,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    unit_noise,
)

INVSR = [[199], [199, 99], [199, 99, 49]]


def one_step(**config: Any) -> OneStepPipeline:
    """With networks of random weights; the picture's sides are padded to multiples of 16."""
    prompt = DefaultPrompt("", 12, 16)
    prompt.embeds.data = unit_noise(1, 12, 16, seed=7)
    tokenizer = tiny_tokenizer()
    components = {
        "vae": tiny_vae(4),
        "unet": tiny_unet(),
        "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        "default_prompt": prompt,
        "tokenizer": tokenizer,
        "text_encoder": tiny_text_encoder(tokenizer),
    }
    pipeline = OneStepPipeline(**{**components, "tile_px": 64, "overlap_px": 16, **config})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pisa(**config: Any) -> OneStepPipeline:
    torch.manual_seed(5)
    pix = tiny_unet()
    for parameter in pix.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return one_step(unet_pix=pix, prediction="residual", timesteps=[[1]], **config)


def invsr(**config: Any) -> OneStepPipeline:
    torch.manual_seed(6)
    predictor = NoisePredictor(
        block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4, temb_channels=16
    ).eval()
    return one_step(noise_predictor=predictor, timesteps=INVSR, default_color_fix="none", **config)


def restored(pipeline: OneStepPipeline, picture: Tensor | None = None, **options: Any) -> Tensor:
    picture = tiny_picture(7, 9) if picture is None else picture
    options = {"generator": seeded(0), "output_type": "pt"} | options
    return pipeline(picture, **options).images


MODELS: list[Callable[[], OneStepPipeline]] = [one_step, pisa, invsr]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("size", [{"scale": 2.5}, {"scale": 6}, {"height": 31, "width": 50}])
def test_the_result_has_the_size_that_was_asked_for(build: Callable[[], OneStepPipeline], size: dict[str, Any]) -> None:
    scale = size.get("scale", 4)
    expected = (size.get("height", round(7 * scale)), size.get("width", round(9 * scale)))
    image = restored(build(), **size)
    assert image.shape == (1, 3, *expected) and torch.isfinite(image).all()


def test_the_latent_is_what_the_closed_form_makes_of_the_lq_latent() -> None:
    pipeline = one_step(timesteps=[[200]])
    picture = tiny_picture(8, 8)
    latents = pipeline(picture, generator=seeded(0), output_type="latent").images
    enlarged = torch.nn.functional.interpolate(picture * 2 - 1, scale_factor=4, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        z = pipeline.vae.encode(enlarged).latent_dist.sample(seeded(0)) * pipeline.vae.config.scaling_factor
        eps = pipeline.unet(z, 200, pipeline.default_prompt.embeds).sample
    assert torch.allclose(latents, 1.151868 * z - 0.571666 * eps, atol=2e-4)


def test_pisas_strengths_blend_two_residuals_and_run_only_what_counts() -> None:
    pipeline = pisa()
    calls = {"pix": 0, "both": 0}
    for name, unet in (("pix", pipeline.unet_pix), ("both", pipeline.unet)):
        unet.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    z, embeds = unit_noise(1, 4, 8, 8), pipeline.encode_prompt()
    with torch.no_grad():
        pix, both = (unet(z, 1, embeds).sample for unet in (pipeline.unet_pix, pipeline.unet))
        for strengths, runs in (((1, 1), (0, 1)), ((1, 0), (1, 0)), ((0.5, 1.2), (1, 1)), ((0, 0), (0, 0))):
            calls.update(pix=0, both=0)
            found = pipeline.predict(z, 1, embeds, lambda_pix=strengths[0], lambda_sem=strengths[1])
            assert torch.allclose(found, strengths[0] * pix + strengths[1] * (both - pix), atol=1e-5)
            assert (calls["pix"], calls["both"]) == runs
    assert not torch.equal(restored(pipeline), restored(pipeline, lambda_sem=0.3))


def test_invsr_takes_as_many_steps_as_it_was_made_for() -> None:
    pipeline = invsr()
    seen: list[int] = []
    results = [restored(pipeline, num_inference_steps=steps) for steps in (None, 1, 3)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])

    def watch(_: object, __: int, timestep: int, ___: dict[str, Any]) -> dict[str, Any]:
        seen.append(timestep)
        return {}

    restored(pipeline, num_inference_steps=3, callback_on_step_end=watch)
    restored(pipeline, timesteps=[150, 10], callback_on_step_end=watch)
    assert seen == [199, 99, 49, 150, 10]
    with pytest.raises(ValueError, match=r"expected one of \[1, 2, 3\]"):
        restored(pipeline, num_inference_steps=4)
    with pytest.raises(ValueError, match="descending"):
        restored(pipeline, timesteps=[10, 150])
    with pytest.raises(ValueError, match="this model was made for"):
        restored(one_step(), timesteps=[10])


def test_invsrs_noise_comes_from_the_picture_itself_at_scale_4() -> None:
    pipeline = invsr()
    picture = tiny_picture(8, 12)
    latents = pipeline(picture, generator=seeded(0), output_type="latent", timesteps=[199]).images
    with torch.no_grad():
        generator = seeded(0)
        enlarged = torch.nn.functional.interpolate(picture * 2 - 1, scale_factor=4, mode="bicubic").clamp(-1, 1)
        z = pipeline.vae.encode(enlarged).latent_dist.sample(generator) * pipeline.vae.config.scaling_factor
        mean, logvar = pipeline.noise_predictor(picture * 2 - 1, 199).chunk(2, dim=1)
        noise = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=generator)
        sigma = 0.569285
        x = z + sigma * noise
        eps = pipeline.unet(x / (sigma**2 + 1) ** 0.5, 199, pipeline.default_prompt.embeds).sample
    assert torch.allclose(latents, x - sigma * eps, atol=2e-4)


def test_tags_and_prompts_become_the_texts_of_the_released_programs() -> None:
    osediff, other = one_step(tags_format="{tags}, {prompt},"), one_step()
    assert osediff.texts(None, "cat, grass", []) == ["cat, grass, ,"]
    assert osediff.texts("clean photo", ["cat", "dog"], []) == ["cat, clean photo,", "dog, clean photo,"]
    assert osediff.texts("cat", None, []) == ["cat"] and osediff.texts(None, None, []) is None
    assert other.texts("clean photo", "cat", []) == ["cat, clean photo"]
    with pytest.raises(ValueError, match="3 tags are given for 2 prompts"):
        other.texts(["a", "b"], ["c", "d", "e"], [])


def test_a_tagger_sees_the_picture_and_its_words_count() -> None:
    pipeline = one_step(tags_format="{tags}, {prompt},")
    shown: list[Image.Image] = []

    def tagger(picture: Image.Image) -> list[str]:
        shown.append(picture)
        return ["cat", "grass"]

    picture = tiny_picture(7, 9)
    tagged = restored(pipeline, picture, tags=tagger)
    assert shown[0].size == (9, 7) and shown[0].getpixel((0, 0))[0] == round(255 * picture[0, 0, 0, 0].item())
    assert torch.equal(tagged, restored(pipeline, picture, prompt="cat, grass, ,"))
    assert not torch.equal(tagged, restored(pipeline, picture))
    both = restored(pipeline, picture, prompt=["cat, grass, ,", ""])
    assert both.shape[0] == 2 and torch.allclose(both[:1], tagged, atol=0.5)


@pytest.mark.parametrize("build", MODELS)
def test_the_autoencoders_tiles_change_nothing_and_the_latents_are_the_models_own(
    build: Callable[[], OneStepPipeline],
) -> None:
    pipeline = build()
    picture = tiny_picture(16, 24)
    whole = restored(pipeline, picture, tiling=Tiling(tile_px="none"))
    coded_in_tiles = restored(pipeline, picture, tiling=Tiling(tile_px="none", vae_tile_px=64))
    assert (whole - coded_in_tiles).abs().max() < 1e-4
    tiled = restored(pipeline, picture, tiling=Tiling(vae_tile_px=96))  # 64 x 96 pixels are more than 64 x 64
    assert pipeline.aggregation.grid.tile == (8, 8) and pipeline.aggregation.grid.overlap == 2
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    assert (tiled - restored(pipeline, picture, tiling=Tiling(vae_tile_px=64))).abs().max() < 1e-4


def test_a_stopped_call_goes_on_to_the_bit(tmp_path: Path) -> None:
    from stablesr_kit.pipelines.job import SamplingState

    pipeline = invsr()
    states: list[SamplingState] = []
    generator = seeded(0)

    def keep(_: object, step: int, __: int, tensors: dict[str, Any]) -> dict[str, Any]:
        scheduler = pipeline.scheduler
        states.append(
            SamplingState.after(
                step + 1, tensors["latents"], scheduler, generator, pipeline.aggregation.grid, pipeline.coder.tile_px
            )
        )
        return tensors

    whole = restored(pipeline, num_inference_steps=3, generator=generator, callback_on_step_end=keep)
    job = Job(state=states[1], record=tmp_path)
    assert torch.equal(whole, restored(pipeline, num_inference_steps=3, job=job))


def test_the_licence_and_every_setting_stay_in_the_folder(tmp_path: Path) -> None:
    pipeline = pisa(licence="Of somebody: for nobody.", default_color_fix="wavelet")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "LICENCE.txt").read_text() == "Of somebody: for nobody.\n"
    loaded = OneStepPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert dict(loaded.config)["timesteps"] == [[1]] and loaded.config.default_color_fix == "wavelet"
    assert (restored(loaded, lambda_sem=0.5) - restored(pipeline, lambda_sem=0.5)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="'cat' needs the components text_encoder and tokenizer"):
        restored(loaded, prompt="cat")
    without = OneStepPipeline.from_pretrained(tmp_path, unet_pix=None)
    without.set_progress_bar_config(disable=True)
    restored(without)
    with pytest.raises(ValueError, match="needs the component unet_pix"):
        restored(without, lambda_sem=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "expected a picture"),
        ({"scale": 0}, "expected a positive number"),
        ({"scale": 2, "height": 8, "width": 8}, "exclude each other"),
        ({"color_fix": "sepia"}, "expected one of"),
        ({"lambda_sem": 0.5}, "strengths of PiSA-SR"),
        ({"lambda_sem": -1}, "expected a number from 0"),
        ({"tags": 5}, "expected text"),
        ({"prompt": "cat", "prompt_embeds": torch.zeros(1, 12, 16)}, "exclude each other"),
        ({"prompt_embeds": torch.zeros(3, 12, 16), "image": torch.zeros(2, 3, 8, 8)}, "3 texts are given for 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "are unknown"),
        ({"num_inference_steps": 2}, "made for"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        one_step()(**{"image": tiny_picture(8, 8), **options})
    assert "\n" not in str(caught.value)


def test_the_plan_is_what_the_call_does() -> None:
    pipeline = one_step()
    assert not pipeline.needs_plan(64, 64, Tiling())
    plan = pipeline.plan(128, 64)
    assert plan.grid is not None and plan.grid.tile == (8, 8) and plan.peak_bytes > 0
    assert pipeline.plan(64, 64).grid is None
    restored(pipeline, tiny_picture(32, 16), job=Job(plan=plan))
    assert pipeline.aggregation.grid == plan.grid and pipeline.coder.tile_px == plan.vae_tile_px
