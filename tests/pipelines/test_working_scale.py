"""A model works at its own scale: what is smaller is made there and reduced, with Pillow's filter as a peer."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stablesr_kit import StableSRPipeline, Tiling
from stablesr_kit.checkpoints.base import canvas_options
from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.pipelines.pictures import lq_psnr, warn_if_far
from tests.helpers.pipeline_runs import run
from tests.helpers.tiny import seeded, tiny_picture, tiny_pipeline, tiny_unet, tiny_vae
from tests.pipelines.test_one_step import invsr, one_step, pisa

TILED = Tiling(tile_px=32, overlap_px=8, vae_tile_px=24)
PICTURE = tiny_picture(18, 13)


def reduced_by_pillow(images: Tensor, height: int, width: int) -> Tensor:
    """Of (1, 3, H, W)."""
    planes = (Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.LANCZOS) for plane in images[0])
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))[None]


def whole(pipeline: Any, image: Any = PICTURE, **options: Any) -> Tensor:
    """An unclamped result, as an image."""
    return assembled(run(pipeline, image, output_type="canvas", **options)[0])


@pytest.mark.parametrize("tiling", [Tiling(), TILED])
@pytest.mark.parametrize(
    ("size", "worked_at"),
    [
        ({"scale": 1}, (72, 52)),
        ({"scale": 1.3}, (72, 52)),
        ({"height": 20, "width": 41}, (72, 52)),
        ({"height": 20, "width": 60}, (72, 60)),
    ],
)
def test_a_smaller_result_is_that_of_the_working_scale_reduced(
    tiling: Tiling, size: dict[str, Any], worked_at: tuple[int, int]
) -> None:
    pipeline = tiny_pipeline(with_text=False, working_scale=4, margin_px=8)
    restored = whole(pipeline, tiling=tiling, **size)
    large = whole(pipeline, tiling=tiling, height=worked_at[0], width=worked_at[1])
    height, width = restored.shape[2:]
    assert (height, width) == (size.get("height", round(18 * size.get("scale", 1))), size.get("width", width))
    torch.testing.assert_close(restored, reduced_by_pillow(large, height, width), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [{}, {"scale": 4}, {"scale": 5}, {"height": 72, "width": 52}])
def test_results_of_the_working_scale_and_above_stay_to_the_bit(size: dict[str, Any]) -> None:
    plain, working = (tiny_pipeline(with_text=False, working_scale=scale) for scale in (0, 4))
    assert torch.equal(run(working, PICTURE, **size), run(plain, PICTURE, **size))


def test_a_call_may_work_coarser_or_finer_than_the_model() -> None:
    plain, working = (tiny_pipeline(with_text=False, working_scale=scale) for scale in (0, 4))
    coarse, fine = (run(working, PICTURE, scale=1, tiling=Tiling(working_scale=scale)) for scale in (0, None))
    assert torch.equal(coarse, run(plain, PICTURE, scale=1))
    assert torch.equal(fine, run(plain, PICTURE, scale=1, tiling=Tiling(working_scale=4)))
    for wrong in (-1, "4", float("inf")):
        with pytest.raises(ConfigError, match=r"working_scale=.* is given, expected 0 \(off\) or a scale"):
            Tiling(working_scale=wrong)


def test_latents_are_of_the_working_canvas_and_decoded_again_at_the_size_asked_for() -> None:
    pipeline = tiny_pipeline(with_text=False, working_scale=4)
    latents, sampled = run_latents(pipeline)
    assert latents.shape == (1, 4, 72 // 4, 56 // 4)
    again = pipeline.redecode(sampled, 0.5, output_type="pt").images
    assert torch.equal(again, run(pipeline, PICTURE, scale=1))
    assert again.shape == (1, 3, 18, 13)


def run_latents(pipeline: Any) -> Any:
    return pipeline(PICTURE, scale=1, generator=seeded(0), output_type="latent", return_dict=False)


def test_every_output_type_and_the_post_stages_have_the_size_asked_for() -> None:
    pipeline, seen = tiny_pipeline(with_text=False, working_scale=4), []

    def stage(images: Tensor, lq_images: Tensor) -> Tensor:
        seen.append((images.shape, lq_images.shape))
        return images

    expected = run(pipeline, PICTURE, scale=1)
    assert torch.equal(run(pipeline, PICTURE, scale=1, post_stages=[stage]), expected)
    assert seen == [((1, 3, 18, 13), (1, 3, 18, 13))]
    pixels = (expected[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.asarray(run(pipeline, PICTURE, scale=1, output_type="pil")[0]), pixels)
    assert np.array_equal((run(pipeline, PICTURE, scale=1, output_type="np")[0] * 255).round(), pixels)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(tile_px=64, overlap_px=16)])
@pytest.mark.parametrize("make", [one_step, pisa, invsr])
def test_one_step_models_have_a_working_scale_and_a_margin_too(make: Any, tiling: Tiling) -> None:
    picture = tiny_picture(24, 20)
    working = make(working_scale=4, margin_px=16)
    restored = whole(working, picture, scale=1, tiling=tiling)
    large = whole(working, picture, tiling=tiling)
    assert large.shape == (1, 3, 96, 80) and restored.shape == (1, 3, 24, 20)
    torch.testing.assert_close(restored, reduced_by_pillow(large, 24, 20), atol=1e-5, rtol=0)
    around = torch.from_numpy(np.pad(View(picture).tensor[0].numpy(), [(0, 0), (4, 4), (4, 4)], mode="reflect"))[None]
    beyond = whole(make(), around, tiling=tiling, color_fix="none")
    assert beyond.shape[2:] == tuple(side + 32 for side in large.shape[2:])


def test_a_margin_of_a_one_step_model_is_the_reflected_picture_around_it() -> None:
    picture = tiny_picture(64, 96)
    around = torch.from_numpy(np.pad(picture[0].numpy(), [(0, 0), (16, 16), (16, 16)], mode="reflect"))[None]
    options = {"scale": 1, "color_fix": "none", "tiling": Tiling(tile_px="none")}
    restored, expected = whole(one_step(margin_px=16), picture, **options), whole(one_step(), around, **options)
    assert torch.equal(restored, expected[..., 16:-16, 16:-16])


def test_the_scale_is_saved_and_older_folders_have_none(tmp_path: Path) -> None:
    tiny_pipeline(with_text=False, working_scale=4).save_pretrained(tmp_path)
    assert StableSRPipeline.from_pretrained(tmp_path).config.working_scale == 4
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"working_scale": 4', '"default_steps": 2'))
    assert StableSRPipeline.from_pretrained(tmp_path).config.working_scale == 0
    assert StableSRPipeline.from_pretrained("mini").config.working_scale == 4


def test_converted_models_of_full_size_work_at_scale_1_on_their_own_canvas_with_a_margin() -> None:
    unet, vae = tiny_unet(), tiny_vae(4)
    assert canvas_options(unet, vae) == {}
    unet.register_to_config(block_out_channels=[320, 640, 1280, 1280], sample_size=64)
    assert canvas_options(unet, vae) == {"min_size_px": 512, "margin_px": 32, "working_scale": 1}


@pytest.mark.parametrize("size", [(18, 13), (7, 40)])
def test_how_far_a_result_is_from_its_picture_is_measured_at_the_smaller_of_their_sizes(size: tuple[int, int]) -> None:
    lq, restored = tiny_picture(*size), tiny_picture(20, 30, seed=1)
    height, width = min(size[0], 20), min(size[1], 30)
    one, other = (reduced_by_pillow(image * 2 - 1, height, width).clamp(-1, 1) / 2 for image in (restored, lq))
    expected = -10 * math.log10(((one - other) ** 2).mean().item())
    assert lq_psnr(View(restored * 2 - 1), View(lq * 2 - 1)) == pytest.approx(expected, abs=1e-3)


def test_a_picture_that_is_not_small_and_changes_much_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline(with_text=False, default_steps=1)
    for height, width, warnings in ((300, 300, 0), (330, 310, 1)):
        caplog.clear()
        run(pipeline, tiny_picture(height, width), scale=1)
        assert len(caplog.messages) == warnings
    assert re.fullmatch(
        r"the result at the picture's size differs .* \(PSNR \d+\.\d dB, less than 30\): .*", *caplog.messages
    )
    caplog.clear()
    picture = tiny_picture(330, 310) * 2 - 1
    warn_if_far(View((picture + 0.03).clamp(-1, 1)), View(picture))
    assert caplog.messages == []
