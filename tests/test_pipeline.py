"""The pipeline in the habits of diffusers: what it takes and returns, how it is saved, shared, swapped and hooked."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import CpuOffload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from stablesr_kit import SFTUNet2DConditionModel, SpacedDDIMScheduler, SpacedDDPMScheduler, StableSRPipeline
from stablesr_kit.errors import ModelNotFoundError
from stablesr_kit.pipelines.stablesr import StableSRPipelineOutput
from tests.tiny import (
    PROMPT_LENGTH,
    TEXT_CHANNELS,
    seeded,
    tiny_adapter,
    tiny_cfw,
    tiny_components,
    tiny_picture,
    tiny_pipeline,
    tiny_unet,
    unit_noise,
)

PICTURE = tiny_picture()


def run(pipeline: Any, image: Any = PICTURE, seed: int = 0, **arguments: Any) -> Any:
    """Images of a call: a tensor unless another type is asked for."""
    return pipeline(image=image, **{"generator": seeded(seed), "output_type": "pt", **arguments}).images


def same(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differs(one: Tensor, other: Tensor, by: float = 1e-3) -> bool:
    return (one - other).abs().max().item() > by


def contents(pipeline: StableSRPipeline) -> dict[str, Tensor]:
    """A copy of every tensor of every network."""
    networks = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
    return {f"{k}.{name}": t.clone() for k, network in networks.items() for name, t in network.state_dict().items()}


# Outputs


def test_the_output_is_a_dataclass_or_a_tuple() -> None:
    pipeline = tiny_pipeline()
    as_class = pipeline(PICTURE, generator=seeded(0), output_type="pt")
    as_tuple = pipeline(PICTURE, generator=seeded(0), output_type="pt", return_dict=False)
    assert isinstance(as_class, StableSRPipelineOutput) and isinstance(as_tuple, tuple)
    assert torch.equal(as_class.images, as_tuple[0]) and torch.equal(as_class[0], as_tuple[0])


def test_every_output_type_holds_the_same_picture() -> None:
    pipeline = tiny_pipeline()
    tensor = run(pipeline, tiny_picture(3, 4))
    array = run(pipeline, tiny_picture(3, 4), output_type="np")
    images = run(pipeline, tiny_picture(3, 4), output_type="pil")
    latent = run(pipeline, tiny_picture(3, 4), output_type="latent")
    assert tensor.shape == (1, 3, 12, 16) and 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert isinstance(images[0], PIL.Image.Image) and images[0].size == (16, 12)
    assert np.abs(np.asarray(images[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert latent.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("height", "width", "arguments", "expected"),
    [
        (1, 1, {}, (4, 4)),
        (1, 9, {}, (4, 36)),
        (7, 2, {}, (28, 8)),
        (5, 13, {"scale": 1}, (5, 13)),
        (5, 13, {"scale": 2.5}, (12, 32)),
        (1, 3, {"scale": 0.1}, (1, 1)),
        (5, 13, {"height": 9, "width": 30}, (9, 30)),
        (20, 20, {"scale": 0.5}, (10, 10)),
    ],
)
def test_a_picture_of_any_size_comes_back_at_exactly_the_size_asked_for(
    height: int, width: int, arguments: dict[str, Any], expected: tuple[int, int]
) -> None:
    restored = run(tiny_pipeline(with_text=False), tiny_picture(height, width), **arguments)
    assert restored.shape == (1, 3, *expected)
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize(("min_size_px", "side"), [(0, 16), (17, 24), (64, 64)])
def test_small_results_are_restored_on_a_larger_canvas(min_size_px: int, side: int) -> None:
    pipeline = tiny_pipeline(with_text=False, min_size_px=min_size_px)
    assert run(pipeline, output_type="latent").shape == (1, 4, side // 4, side // 4)
    assert run(pipeline).shape == (1, 3, 16, 16)


def test_the_wavelet_colour_fix_is_the_default_and_gives_the_colours_of_the_input() -> None:
    pipeline = tiny_pipeline(with_text=False)
    picture = torch.cat([tiny_picture(8, 8)[:, :1] * 0.2, 0.8 + 0.2 * tiny_picture(8, 8)[:, 1:]], dim=1)
    wanted = picture.mean((2, 3))
    distances = {fix: (run(pipeline, picture, color_fix=fix).mean((2, 3)) - wanted).norm().item() for fix in
                 ("none", "wavelet", "adain")}  # fmt: skip
    assert distances["wavelet"] < 0.1 * distances["none"]
    assert distances["adain"] < 0.3 * distances["none"]
    assert torch.equal(run(pipeline, picture), run(pipeline, picture, color_fix="wavelet"))


# Randomness and batches


def test_a_seed_decides_the_result() -> None:
    pipeline = tiny_pipeline(with_text=False)
    assert torch.equal(run(pipeline, seed=1), run(pipeline, seed=1))
    assert differs(run(pipeline, seed=1), run(pipeline, seed=2))


@pytest.mark.parametrize("scheduler", [SpacedDDPMScheduler(), DPMSolverMultistepScheduler()])
def test_a_batch_equals_its_pictures_alone(scheduler: Any) -> None:
    pipeline = tiny_pipeline(scheduler=scheduler)
    pictures, prompts = [tiny_picture(seed=i) for i in range(3)], ["cat", "a very long dog", ""]
    together = run(pipeline, pictures, prompt=prompts, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        same(together[i : i + 1], run(pipeline, pictures[i], prompt=prompts[i], seed=i))


def test_num_images_per_prompt_repeats_each_picture_in_place() -> None:
    pipeline = tiny_pipeline()
    pictures = [tiny_picture(seed=i) for i in range(2)]
    generators = [seeded(i) for i in range(4)]
    images = run(pipeline, pictures, prompt=["cat", "dog"], num_images_per_prompt=2, generator=generators)
    for i, (picture, prompt) in enumerate([(0, "cat"), (0, "cat"), (1, "dog"), (1, "dog")]):
        same(images[i : i + 1], run(pipeline, pictures[picture], prompt=prompt, seed=i))


def test_one_picture_serves_several_prompts_and_one_prompt_several_pictures() -> None:
    pipeline = tiny_pipeline()
    images = run(pipeline, prompt=["cat", "dog"], generator=[seeded(0), seeded(0)])
    assert differs(images[0], images[1], by=1e-4)
    same(images[1:], run(pipeline, prompt="dog"))
    pictures = [tiny_picture(seed=i) for i in range(2)]
    images = run(pipeline, pictures, prompt="cat", generator=[seeded(0), seeded(0)])
    same(images[1:], run(pipeline, pictures[1], prompt="cat"))


def test_latents_replace_the_drawn_noise() -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=SpacedDDIMScheduler())
    noise = unit_noise(1, 4, 4, 4, seed=9)
    given = run(pipeline, latents=noise)
    assert torch.equal(given, run(pipeline, latents=noise))
    assert differs(given, run(pipeline, latents=-noise))
    generator = seeded(0)
    torch.randn((1, 4, 4, 4), generator=generator)  # what the sample of the LQ latent takes
    drawn = torch.randn((1, 4, 4, 4), generator=generator)
    assert torch.equal(run(pipeline, latents=drawn), run(pipeline))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 8, 8\) are given, expected \(1, 4, 4, 4\)"):
        run(pipeline, latents=unit_noise(1, 4, 8, 8))


def test_a_call_changes_no_network() -> None:
    pipeline = tiny_pipeline()
    before = contents(pipeline)
    run(pipeline, prompt="cat", guidance_scale=3.0)
    after = contents(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Schedulers and where to start

SCHEDULERS = [
    SpacedDDPMScheduler,
    SpacedDDIMScheduler,
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
]
every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)


@every_scheduler
@pytest.mark.parametrize("start", ["lq", "noise", 600])
def test_every_scheduler_starts_from_lq_from_noise_and_from_a_timestep(kind: Any, start: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    visited: list[float] = []

    def note(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        visited.append(float(timestep))
        return tensors

    if kind is PNDMScheduler and start == 600:  # counts its steps from the first on
        with pytest.raises(ValueError, match="PNDMScheduler can only run from its first timestep.*take another"):
            run(pipeline, num_inference_steps=4, start=start)
        return
    restored = run(pipeline, num_inference_steps=4, start=start, callback_on_step_end=note)
    assert torch.isfinite(restored).all()
    assert visited == sorted(visited, reverse=True) and len(visited) == pipeline.num_timesteps
    assert visited[0] <= (600 if start == 600 else 999)
    assert visited[0] > (200 if start == 600 else 700)


@pytest.mark.parametrize(
    "kind",
    [
        SpacedDDIMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("start", ["lq", 700, 300])
def test_the_latent_has_the_noise_level_of_its_timestep_wherever_it_starts(kind: Any, start: Any) -> None:
    config = SpacedDDPMScheduler(timestep_spacing="trailing").config
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(config))
    scheduler = pipeline.scheduler
    x0, noise = unit_noise(1, 4, 4, 4, seed=1), unit_noise(1, 4, 4, 4, seed=2)
    timesteps = pipeline.get_timesteps(10, torch.device("cpu"), start)
    if hasattr(scheduler, "begin_index"):
        assert scheduler.begin_index == len(scheduler.timesteps) - len(timesteps)
    x = pipeline.prepare_latents(x0, timesteps, start, latents=noise)
    for i, timestep in enumerate(timesteps):
        alpha = scheduler.alphas_cumprod[timestep.long()]
        if i % scheduler.order == 0:  # Heun's second visits are in between
            seen = scheduler.scale_model_input(x, timestep)
            same(seen, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, atol=2e-3)
        else:
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(noise, timestep, x, return_dict=False)[0]
    same(x, x0, atol=2e-3)


@every_scheduler
def test_a_start_from_noise_shows_the_unet_noise_of_variance_one(kind: Any) -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(SpacedDDPMScheduler().config))
    noise = unit_noise(1, 4, 4, 4)
    timesteps = pipeline.get_timesteps(10, torch.device("cpu"), "noise")
    latents = pipeline.prepare_latents(torch.zeros_like(noise), timesteps, "noise", latents=noise)
    same(pipeline.scheduler.scale_model_input(latents, timesteps[0]), noise, atol=2e-2)


@pytest.mark.parametrize("kind", [SpacedDDPMScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_a_call_is_its_public_steps_in_order(kind: Any) -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(SpacedDDPMScheduler().config))
    called = run(pipeline, num_inference_steps=3, w=1.0, color_fix="none")
    generator, scheduler = seeded(0), pipeline.scheduler
    canvas = pipeline.pad(pipeline.upsample(PICTURE * 2 - 1))
    lq_latents, features = pipeline.encode_image(canvas, generator)
    embeds, _ = pipeline.encode_prompt(None, torch.device("cpu"), 1, False)
    timesteps = pipeline.get_timesteps(3, torch.device("cpu"), "lq")
    latents = pipeline.prepare_latents(lq_latents, timesteps, "lq", generator)
    for timestep in timesteps:
        prediction = pipeline.predict(scheduler.scale_model_input(latents, timestep), timestep, lq_latents, embeds)
        latents = scheduler.step(prediction, timestep, latents, generator=generator).prev_sample
    restored = pipeline.decode_latents(latents, features, 1.0)
    same(((restored + 1) / 2).clamp(0, 1), called)


def test_a_start_above_the_first_timestep_is_the_start_from_lq() -> None:
    pipeline = tiny_pipeline(with_text=False)
    assert torch.equal(run(pipeline, start=999), run(pipeline))
    assert differs(run(pipeline, start="noise"), run(pipeline))


def test_a_late_start_stays_near_the_input() -> None:
    pipeline = tiny_pipeline(with_text=False)
    lq_latents, _ = pipeline.encode_image(pipeline.pad(pipeline.upsample(PICTURE * 2 - 1)), seeded(0), False)
    far, near = (run(pipeline, output_type="latent", num_inference_steps=4, start=start) for start in ("lq", 0))
    assert (near - lq_latents).abs().max() < 0.2 < (far - lq_latents).abs().max()


def test_a_start_below_every_timestep_is_refused() -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=DDPMScheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="start=3 lies below the last timestep 499; give more steps"):
        run(pipeline, start=3)


def test_own_timesteps_are_kept() -> None:
    pipeline, visited = tiny_pipeline(with_text=False), []

    def note(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        visited.append(int(timestep))
        return tensors

    run(pipeline, timesteps=[900, 300, 20], callback_on_step_end=note)
    assert visited == [900, 300, 20]
    with pytest.raises(ValueError, match="does not support custom sigmas"):
        run(pipeline, sigmas=[1.0, 0.5])


def test_the_default_number_of_steps_belongs_to_the_pipeline() -> None:
    pipeline = tiny_pipeline(with_text=False, default_steps=3)
    run(pipeline)
    assert pipeline.num_timesteps == 3
    run(pipeline, num_inference_steps=1)
    assert pipeline.num_timesteps == 1


def test_eta_reaches_the_schedulers_that_know_it() -> None:
    pipeline = tiny_pipeline(with_text=False, scheduler=SpacedDDIMScheduler())
    assert differs(run(pipeline, eta=1.0), run(pipeline, eta=0.0))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(run(pipeline, eta=1.0), run(pipeline, eta=0.0))


# Prompts


def test_prompt_and_negative_prompt_steer_the_result() -> None:
    pipeline = tiny_pipeline()
    plain = run(pipeline, prompt="cat")
    assert differs(plain, run(pipeline, prompt="a dog in the rain"), by=1e-4)
    guided = run(pipeline, prompt="cat", guidance_scale=4.0)
    assert differs(guided, plain, by=1e-4)
    assert differs(guided, run(pipeline, prompt="cat", negative_prompt="blurry", guidance_scale=4.0), by=1e-4)
    same(run(pipeline, prompt="cat", negative_prompt="cat", guidance_scale=4.0), plain)
    assert torch.equal(run(pipeline, prompt="cat", negative_prompt="blurry"), plain)  # no guidance, no negative


def test_guidance_is_the_formula() -> None:
    pipeline = tiny_pipeline()
    x, lq = unit_noise(2, 4, 4, 4), unit_noise(2, 4, 4, 4, seed=1)
    positive, negative = unit_noise(2, 5, TEXT_CHANNELS), unit_noise(2, 5, TEXT_CHANNELS, seed=1)
    with torch.no_grad():
        cond, uncond = (pipeline.predict(x, 500, lq, embeds) for embeds in (positive, negative))
        guided = pipeline.predict(x, 500, lq, torch.cat([negative, positive]), guidance_scale=3.0)
        shared = pipeline.predict(x, 500, lq, positive[:1])
        repeated = pipeline.predict(x, 500, lq, positive[:1].repeat(2, 1, 1))
    same(guided, uncond + 3.0 * (cond - uncond))
    same(shared, repeated)


def test_embeddings_stand_for_their_prompts() -> None:
    pipeline = tiny_pipeline()
    expected = run(pipeline, prompt="cat", negative_prompt="blurry", guidance_scale=3.0)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt("cat", torch.device("cpu"), 1, True, "blurry")
    bare = tiny_pipeline(with_text=False)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    same(run(bare, guidance_scale=3.0, **embeds), expected)
    one_each = {"prompt_embeds": positive.repeat(2, 1, 1), "negative_prompt_embeds": negative}
    same(run(bare, guidance_scale=3.0, generator=[seeded(0), seeded(0)], **one_each)[1:], expected)


def test_without_a_text_encoder_the_adapter_knows_the_empty_prompt() -> None:
    with_text, without = tiny_pipeline(), tiny_pipeline(with_text=False)
    with torch.no_grad():
        empty, _ = with_text.encode_prompt(None, torch.device("cpu"), 1, False)
    assert empty.shape == (1, PROMPT_LENGTH, TEXT_CHANNELS)
    assert torch.equal(run(with_text), run(with_text, prompt=""))
    assert differs(run(without), run(with_text), by=1e-4)
    without.adapter.empty_prompt_embeds.copy_(empty)
    same(run(without), run(with_text))
    same(run(without, prompt=""), run(with_text))
    same(run(without, guidance_scale=3.0), run(with_text))


@pytest.mark.parametrize("arguments", [{"prompt": "cat"}, {"negative_prompt": "blurry", "guidance_scale": 3.0}])
def test_a_prompt_without_a_text_encoder_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs the components text_encoder and tokenizer.*; load them, or give no"):
        run(tiny_pipeline(with_text=False), **arguments)


def test_no_text_encoder_and_no_stored_empty_prompt_is_refused() -> None:
    pipeline = tiny_pipeline(with_text=False, adapter=tiny_adapter(tiny_unet(), prompt_length=0))
    with pytest.raises(ValueError, match="prompt=None needs the components text_encoder and tokenizer"):
        run(pipeline)


def test_clip_skip_takes_an_earlier_layer() -> None:
    pipeline = tiny_pipeline()
    assert differs(run(pipeline, prompt="cat", clip_skip=1), run(pipeline, prompt="cat"), by=1e-5)
    assert pipeline.clip_skip is None
    encoder = pipeline.text_encoder
    tokens = pipeline.tokenizer("cat", padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        ours, _ = pipeline.encode_prompt("cat", torch.device("cpu"), 1, False, clip_skip=1)
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    same(ours, F.layer_norm(hidden, (TEXT_CHANNELS,), norm.weight, norm.bias))


# w


def test_w_is_a_half_with_a_cfw_and_zero_without() -> None:
    pipeline = tiny_pipeline(with_text=False)
    assert torch.equal(run(pipeline), run(pipeline, w=0.5))
    plain = run(pipeline, w=0)
    distances = [(run(pipeline, w=w) - plain).norm().item() for w in (0.25, 0.5, 1.0, 1.5)]
    assert distances == sorted(distances) and distances[0] > 1e-3
    without = tiny_pipeline(with_text=False, cfw=None)
    assert torch.equal(run(without), plain)
    with pytest.raises(ValueError, match="w=0.5 needs the component cfw.*; give w=0 or load a cfw"):
        run(without, w=0.5)


# Callbacks


def test_callbacks_see_the_tensors_they_ask_for() -> None:
    pipeline = tiny_pipeline()
    for asked in (["latents"], ["prompt_embeds"], pipeline._callback_tensor_inputs):
        seen = []

        def note(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], seen: list[Any] = seen
        ) -> dict[str, Any]:
            assert pipe is pipeline
            seen.append((step, int(timestep), sorted(tensors)))
            return tensors

        run(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=asked, prompt="cat")
        assert seen == [(0, 999, sorted(asked)), (1, 0, sorted(asked))]
    with pytest.raises(ValueError, match=r"\['image'\] are unknown, expected some of \['latents'"):
        run(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["image"])


def test_callbacks_change_tensors_and_guidance() -> None:
    pipeline = tiny_pipeline()

    def erase(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not run(pipeline, output_type="latent", callback_on_step_end=erase).any()

    def other_text(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    asked = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert differs(run(pipeline, callback_on_step_end=other_text, **asked), run(pipeline), by=1e-6)

    def raise_guidance(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1.0
        return tensors

    text = {"prompt": "cat", "guidance_scale": 2.0, "num_inference_steps": 4}
    raised = run(pipeline, callback_on_step_end=raise_guidance, **text)
    assert pipeline.guidance_scale == 6.0 and pipeline.do_classifier_free_guidance
    assert differs(raised, run(pipeline, **text), by=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_callback_of_diffusers_that_cuts_guidance_off_works(batch: int) -> None:
    pipeline = tiny_pipeline()
    cut = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)])
    arguments = {"prompt": "cat", "guidance_scale": 5.0, "num_inference_steps": 3}
    generators = [seeded(0) for _ in range(batch)]
    images = run(pipeline, [PICTURE] * batch, callback_on_step_end=cut, generator=generators, **arguments)
    assert pipeline.guidance_scale == 0 and len(images) == batch
    assert differs(images[:1], run(pipeline, **arguments), by=1e-5)


def test_a_callback_can_interrupt() -> None:
    pipeline, steps = tiny_pipeline(with_text=False), []

    def stop(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return tensors

    assert run(pipeline, num_inference_steps=4, callback_on_step_end=stop).shape == (1, 3, 16, 16)
    assert steps == [0] and pipeline.interrupt
    run(pipeline)
    assert not pipeline.interrupt


def test_the_progress_bar_is_configurable(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline(with_text=False)
    run(pipeline)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="restoring")
    run(pipeline)
    assert "restoring: 100%" in (err := capsys.readouterr().err) and "2/2" in err


# Files


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
    assert set(loaded.components) == set(pipeline.components) == set(tiny_components())
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
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(), safety_checker=None)
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


# Sharing with other pipelines


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

    again = kind.from_pipe(ours, unet=ours.unet, safety_checker=None, feature_extractor=None)
    again.set_progress_bar_config(disable=True)
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
    assert isinstance(pipeline.unet, SFTUNet2DConditionModel)
    assert torch.equal(run(pipeline), expected)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert tuple(pipeline.config.unet) == ("diffusers", "UNet2DConditionModel")
    pipeline.save_pretrained(tmp_path)
    loaded = StableSRPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    same(run(loaded), expected, atol=1e-4)  # weights lie elsewhere in memory


# LoRA and textual inversion


def save_lora(folder: Path) -> None:
    """LoRA weights of the UNet, residual convolutions included, and of the text encoder."""
    pipeline = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = {"unet": ["to_q", "to_v", "conv2"], "text_encoder": ["q_proj", "v_proj"]}
        for name, modules in targets.items():
            config = LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
            getattr(pipeline, name).add_adapter(config)
    StableSRPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )


def test_lora_weights_load_scale_fuse_and_unload(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipeline = tiny_pipeline()
    base = run(pipeline, prompt="cat")
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    styled = run(pipeline, prompt="cat")
    assert differs(styled, base)

    same(run(pipeline, prompt="cat", cross_attention_kwargs={"scale": 0.0}), base)
    half = run(pipeline, prompt="cat", cross_attention_kwargs={"scale": 0.5})
    assert differs(half, base) and differs(half, styled)
    assert torch.equal(run(pipeline, prompt="cat"), styled)  # the scale does not outlive its call
    pipeline.set_adapters(["style"], [0.5])
    same(run(pipeline, prompt="cat"), half)
    pipeline.set_adapters(["style"], [1.0])

    pipeline.fuse_lora()
    same(run(pipeline, prompt="cat"), styled, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    same(run(pipeline, prompt="cat"), base, atol=1e-4)


def test_lora_weights_of_the_text_encoder_count_without_a_prompt_too(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipeline = tiny_pipeline()
    empty = {"prompt": None, "device": torch.device("cpu"), "num_images_per_prompt": 1}
    with torch.no_grad():
        before, _ = pipeline.encode_prompt(**empty, do_classifier_free_guidance=False)
        pipeline.load_lora_weights(tmp_path)
        after, _ = pipeline.encode_prompt(**empty, do_classifier_free_guidance=False)
    assert differs(before, after)


def test_textual_inversion_adds_a_word() -> None:
    pipeline = tiny_pipeline()
    before = run(pipeline, prompt="<toy>")
    word = unit_noise(TEXT_CHANNELS)
    pipeline.load_textual_inversion({"<toy>": word})
    token = pipeline.tokenizer.convert_tokens_to_ids("<toy>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[token], word)
    assert differs(run(pipeline, prompt="<toy>"), before, by=1e-4)


# Memory and speed


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


# Precision


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


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image=None is given, expected a picture"),
        ({"w": -0.1}, "w=-0.1 is given, expected a number from 0"),
        ({"w": math.nan}, "w=nan is given, expected a number from 0"),
        ({"w": math.inf}, "w=inf is given"),
        ({"scale": 2, "height": 8, "width": 8}, "scale and height/width exclude each other; give one of them"),
        ({"height": 8}, "height=8, width=None: give both, or scale"),
        ({"scale": 0}, "scale=0 is given, expected a positive number"),
        ({"scale": math.nan}, "scale=nan is given, expected a positive number"),
        ({"height": 0, "width": 8}, "height=0, width=8 is given, expected at least one pixel each"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is given, expected at least 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 is given, expected 1 to 1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 is given, expected at least 1"),
        ({"start": "middle"}, "start='middle' is given, expected 'lq', 'noise' or a timestep"),
        ({"start": -1}, "start=-1 is given, expected"),
        ({"color_fix": "magic"}, r"color_fix='magic' is given, expected one of \('wavelet', 'adain', 'none'\)"),
        ({"output_type": "numpy"}, "output_type='numpy' is given, expected one of"),
        ({"prompt": 5}, "a prompt 5 is given, expected text or a list of texts"),
        ({"prompt": "a", "prompt_embeds": unit_noise(1, 12, 16)}, "prompt and prompt_embeds exclude each other"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": unit_noise(1, 12, 16)},
            "negative_prompt and negative_prompt_embeds exclude each other",
        ),
        ({"image": torch.cat([PICTURE] * 3), "prompt": ["a", "b"]}, "2 prompts are given for 3 pictures; give one, or"),
        (
            {"image": torch.cat([PICTURE] * 4), "negative_prompt": ["a", "b"], "guidance_scale": 3.0},
            "2 prompts are given for 4 pictures; give one, or one per picture",
        ),
        (
            {"prompt_embeds": unit_noise(1, 5, 16), "guidance_scale": 3.0},
            r"prompt_embeds of shape \(5, 16\) and negative_prompt_embeds of shape \(12, 16\) are given; give both",
        ),
        ({"generator": [seeded(0)] * 3, "prompt": ["a", "b"]}, "3 generators are given for 2 results; give one, or"),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**{"image": PICTURE, **arguments})
    assert "\n" not in str(error.value)


def test_a_cfw_of_fewer_levels_than_the_autoencoder_is_fine() -> None:
    pipeline = tiny_pipeline(with_text=False)
    pipeline.cfw = tiny_cfw(pipeline.vae, levels=(2,))
    assert differs(run(pipeline, w=1.0), run(pipeline, w=0.0))
