"""Decoding again what is sampled already: w, the colour fix and the post-stages change, the sampler does not run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stablesr_kit import Tiling
from tests.helpers.pipeline_runs import PICTURE, differs, run
from tests.helpers.tiny import seeded, tiny_picture, tiny_pipeline

TILED = Tiling(tile_px=48, overlap_px=16, vae_tile_px=24)


@pytest.mark.parametrize("tiling", [None, TILED])
def test_decoding_again_gives_the_bits_of_a_whole_call_and_samples_nothing(tiling: Tiling | None) -> None:
    pipeline, picture = tiny_pipeline(with_text=False), tiny_picture(18, 25)
    sampled = pipeline(picture, generator=seeded(0), tiling=tiling, output_type="latent").sampled
    expected = {w: run(pipeline, picture, w=w, tiling=tiling, color_fix="adain") for w in (0.0, 0.5, 1.0)}
    calls: list[Any] = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(None))
    fused_first: list[Any] = []
    first = pipeline.cfw.fusion_layers[str(max(pipeline.cfw.config.levels))]
    if tiling is None:  # where features lie in memory
        first.register_forward_pre_hook(lambda *_: fused_first.append(None))
    for w in (1.0, 0.0, 0.5, 0.0):
        again = pipeline.redecode(sampled, w, color_fix="adain", output_type="pt").images
        # a call with w=0 encodes without features, in tiles of other sizes, which some processors round otherwise
        atol = 1e-5 if tiling is not None and w == 0 else 0
        torch.testing.assert_close(again, expected[w], atol=atol, rtol=0)
    assert torch.equal(pipeline.redecode(sampled, output_type="pt").images, run_of(pipeline, sampled, 0.5))
    assert not calls
    assert len(fused_first) == (tiling is None)


def test_sliced_pictures_are_decoded_again_to_the_same_bits() -> None:
    pipeline = tiny_pipeline(with_text=False)
    pictures = torch.cat([PICTURE, tiny_picture(seed=1)])
    expected = [run_of(pipeline, sampled_of(pipeline, pictures), w) for w in (0.2, 0.9)]
    pipeline.vae.enable_slicing()
    sampled = sampled_of(pipeline, pictures)
    for w, images in ((0.2, expected[0]), (0.9, expected[1]), (0.2, expected[0])):
        torch.testing.assert_close(run_of(pipeline, sampled, w), images, atol=1e-5, rtol=0)


def sampled_of(pipeline: Any, pictures: Tensor) -> Any:
    return pipeline(pictures, generator=[seeded(i) for i in range(2)], output_type="latent").sampled


def run_of(pipeline: Any, sampled: Any, w: float) -> Tensor:
    images: Tensor = pipeline.redecode(sampled, w, color_fix="wavelet", output_type="pt").images
    return images


def test_post_stages_and_several_results_per_picture_are_decoded_again_too() -> None:
    pipeline = tiny_pipeline(with_text=False)
    pictures, seen = torch.cat([PICTURE, tiny_picture(seed=1)]), []

    def invert(images: Tensor, lq_images: Tensor) -> Tensor:
        seen.append(lq_images)
        return -images

    options = {"num_images_per_prompt": 2, "generator": [seeded(i) for i in range(4)]}
    expected = pipeline(pictures, output_type="pt", post_stages=[invert], **options).images
    options["generator"] = [seeded(i) for i in range(4)]
    latents, sampled = pipeline(pictures, output_type="latent", return_dict=False, **options)
    assert latents is sampled.latents
    (images,) = pipeline.redecode(sampled, post_stages=[invert], output_type="pt", return_dict=False)
    assert torch.equal(images, expected)
    assert torch.equal(seen[0], seen[1])


def test_a_call_with_w_0_keeps_no_features_and_says_so() -> None:
    pipeline = tiny_pipeline(with_text=False)
    sampled = pipeline(PICTURE, w=0.0, generator=seeded(0), output_type="latent").sampled
    assert not any(sampled.features)
    assert torch.equal(pipeline.redecode(sampled, output_type="pt").images, run(pipeline, w=0.0))
    with pytest.raises(ValueError, match="w=0.3 needs the features that a call with w > 0 keeps; call again"):
        pipeline.redecode(sampled, 0.3)
    for name, value in (("color_fix", "magic"), ("w", -1.0), ("output_type", "numpy")):
        with pytest.raises(ValueError, match=f"{name}={value!r} is given, expected"):
            pipeline.redecode(sampled, **{name: value})
    assert differs(run(pipeline, w=1.0), run(pipeline, w=0.0))
