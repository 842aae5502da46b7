"""What the pipeline takes and returns, in the habits of diffusers."""

import math
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from stablesr_kit import SpacedDDIMScheduler, SpacedDDPMScheduler, Tiling
from stablesr_kit.pipelines.stablesr import StableSRPipelineOutput
from tests.helpers.pipeline_runs import PICTURE, contents, differs, run, same
from tests.helpers.tiny import seeded, tiny_cfw, tiny_picture, tiny_pipeline, unit_noise


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


@pytest.mark.parametrize("tiling", [None, Tiling(tile_px=24, overlap_px=8, vae_tile_px=16)])
def test_a_margin_is_the_reflected_picture_around_it_and_is_cut_back(tiling: Tiling | None) -> None:
    picture = tiny_picture(16, 24)
    around = np.pad(picture[0].numpy(), [(0, 0), (8, 8), (8, 8)], mode="reflect")
    options = {"scale": 1, "color_fix": "none", "tiling": tiling}
    with_margin = tiny_pipeline(with_text=False, margin_px=8)
    assert with_margin.padded_size(16, 24) == (32, 40)
    restored = run(with_margin, picture, **options)
    expected = run(tiny_pipeline(with_text=False), torch.from_numpy(around)[None], **options)
    assert torch.equal(restored, expected[..., 8:-8, 8:-8])
    uneven = run(with_margin, tiny_picture(5, 7), tiling=tiling)
    assert uneven.shape == (1, 3, 20, 28)


def test_the_wavelet_colour_fix_is_the_default_and_gives_the_colours_of_the_input() -> None:
    pipeline = tiny_pipeline(with_text=False)
    picture = torch.cat([tiny_picture(8, 8)[:, :1] * 0.2, 0.8 + 0.2 * tiny_picture(8, 8)[:, 1:]], dim=1)
    wanted = picture.mean((2, 3))
    distances = {fix: (run(pipeline, picture, color_fix=fix).mean((2, 3)) - wanted).norm().item() for fix in
                 ("none", "wavelet", "adain")}  # fmt: skip
    assert distances["wavelet"] < 0.1 * distances["none"]
    assert distances["adain"] < 0.3 * distances["none"]
    assert torch.equal(run(pipeline, picture), run(pipeline, picture, color_fix="wavelet"))


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
        (
            {"color_fix": "magic"},
            r"color_fix='magic' is given, expected one of \('wavelet', 'adain', 'ycbcr', 'none'\)",
        ),
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
