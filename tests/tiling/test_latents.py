"""Tiled sampling: what cannot change the picture, what must, and what happens when memory lacks."""

import io
import itertools
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stablesr_kit import SpacedDDIMScheduler, SpacedDDPMScheduler, Tiling
from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import View, assembled
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.tiling.autoencoder import PictureCoder, smallest_tile_px
from stablesr_kit.tiling.latents import Aggregation, Blend, TileGrid, choose_grid, native_tile, repeat_for_tiles
from tests.helpers.tiny import seeded, tiny_components, tiny_picture, tiny_pipeline, tiny_unet, tiny_vae, unit_noise

SCHEDULERS = [SpacedDDPMScheduler, SpacedDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler]
SCHEDULERS += [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
SCHEDULERS += [UniPCMultistepScheduler]
PICTURE = tiny_picture(18, 25)  # a canvas of 18 x 26 latents
TILED = {"tile_px": 48, "overlap_px": 16, "vae_tile_px": 512}
TILES = {field.name for field in fields(Tiling)}


def run(pipeline: Any, picture: Tensor = PICTURE, **arguments: Any) -> Tensor:
    """Latents of a tiled call."""
    tiling = Tiling(**{**TILED, **{name: arguments.pop(name) for name in TILES & arguments.keys()}})
    call = {"generator": seeded(0), "output_type": "latent", "w": 0.0, **arguments}
    return pipeline(picture, tiling=tiling, **call).images


def prediction_of(pipeline: Any, **options: Any) -> Any:
    """What the pipeline's networks predict of a batch of tiles at timestep 500."""
    return partial(steered_prediction, pipeline.unet, pipeline.adapter, timestep=500, **options)


def aggregation(size: tuple[int, int], grid: TileGrid | None, **options: Any) -> Aggregation:
    return Aggregation(size, grid, 2, torch.device("cpu"), torch.float32, **options)


@pytest.mark.parametrize(
    ("kind", "prediction_type", "guidance_scale"),
    # every scheduler once, the four combinations in turn
    [
        (kind, *combination)
        for kind, combination in zip(
            SCHEDULERS, itertools.cycle(itertools.product(["epsilon", "v_prediction"], [1.0, 3.0])), strict=False
        )
    ],
)
def test_every_scheduler_samples_in_tiles_in_batches_of_any_size(
    kind: Any, prediction_type: str, guidance_scale: float
) -> None:
    config = {**SpacedDDPMScheduler().config, "prediction_type": prediction_type, "skip_prk_steps": True}
    pipeline = tiny_pipeline(with_text=False, scheduler=kind.from_config(config))
    latents = run(pipeline, guidance_scale=guidance_scale)
    assert latents.shape == (1, 4, 18, 26) and latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, run(pipeline, guidance_scale=guidance_scale, batch_size=5))


def test_the_batch_and_the_order_of_the_tiles_do_not_change_a_bit() -> None:
    components = tiny_components(with_text=False)
    pipeline = tiny_pipeline(**components)
    x, lq = unit_noise(2, 4, 18, 26), unit_noise(2, 4, 18, 26, seed=1)
    embeds = components["adapter"].empty_prompt_embeds.expand(2, -1, -1)
    predict = prediction_of(pipeline)
    expected = aggregation((18, 26), TileGrid(tile=(12, 12), overlap=4)).predict(predict, x, lq, embeds, 0)
    for batch_size in (2, 3, 7):
        tiled = aggregation((18, 26), TileGrid(tile=(12, 12), overlap=4, batch_size=batch_size))
        assert torch.equal(tiled.predict(predict, x, lq, embeds, 0), expected)
        regions = tiled.regions(0)
        blend = Blend(regions)
        order = torch.randperm(len(regions), generator=seeded(batch_size)).tolist()
        for index, prediction in tiled.predictions(predict, x, lq, embeds, [], regions, order):
            blend.add(index, prediction)
        assert torch.equal(blend.mean(), expected)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_batch_of_tiles_predicts_what_they_do_alone(branches: int) -> None:
    pipeline = tiny_pipeline(with_text=False)
    x, lq = unit_noise(2, 4, 18, 26), unit_noise(2, 4, 18, 26, seed=1)
    embeds = unit_noise(2 * branches, 12, 16)
    tiled = aggregation((18, 26), TileGrid(tile=(12, 12), overlap=4, batch_size=3))
    regions = tiled.regions(0)
    predict = prediction_of(pipeline, guidance_scale=4.0)
    alone = dict(tiled.predictions(predict, x, lq, embeds, [], regions, range(len(regions))))
    batch = torch.cat([region.crop(x) for region in regions]), torch.cat([region.crop(lq) for region in regions])
    together = predict(latents=batch[0], lq_latents=batch[1], prompt_embeds=repeat_for_tiles(embeds, 2, len(regions)))
    for index, prediction in enumerate(together.split(2)):
        torch.testing.assert_close(prediction, alone[index], atol=2e-5, rtol=0)


def test_a_canvas_of_one_tile_is_predicted_whole() -> None:
    pipeline = tiny_pipeline(with_text=False)
    x, lq, embeds = unit_noise(1, 4, 12, 16), unit_noise(1, 4, 12, 16, seed=1), unit_noise(1, 12, 16)
    predict = prediction_of(pipeline)
    for grid in (None, TileGrid(tile=(16, 16), overlap=8)):
        found = aggregation((12, 16), grid).predict(predict, x, lq, embeds, 0)
        assert torch.equal(found, predict(latents=x, lq_latents=lq, prompt_embeds=embeds))


def test_small_pictures_are_never_tiled_and_large_ones_are() -> None:
    pipeline = tiny_pipeline(with_text=False)
    assert torch.equal(run(pipeline, tile_px="auto", overlap_px=None), run(pipeline, tile_px="none", overlap_px=None))
    large = tiny_picture(24, 60)  # 24 x 60 latents, more than four times 16 x 16
    tiled = run(pipeline, large, tile_px="auto", overlap_px=None)
    assert torch.equal(tiled, run(pipeline, large, tile_px=64, overlap_px=16))
    assert not torch.equal(tiled, run(pipeline, large, tile_px="none", overlap_px=None))


def test_jitter_moves_the_tiles_at_every_step_as_a_function_of_the_seed() -> None:
    tiling = TileGrid(tile=(16, 16), overlap=2)
    moving = aggregation((40, 40), tiling, jitter_seed=3)
    assert [moving.regions(i) for i in range(4)] == [
        aggregation((40, 40), tiling, jitter_seed=3).regions(i) for i in range(4)
    ]
    assert len({tuple(moving.regions(i)) for i in range(8)}) == 8
    assert moving.regions(0) != aggregation((40, 40), tiling, jitter_seed=4).regions(0)
    pipeline = tiny_pipeline(with_text=False)
    assert not torch.equal(run(pipeline, jitter=True), run(pipeline))
    assert torch.equal(run(pipeline, jitter=True), run(pipeline, jitter=True))


def test_callbacks_and_interruption_hold_in_tiles() -> None:
    seen = []

    def callback(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].shape)
        pipeline._interrupt = step == 1
        return {"latents": tensors["latents"] * 0 + step}

    latents = run(tiny_pipeline(with_text=False), num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [(1, 4, 18, 26)] * 2
    assert torch.equal(latents, torch.ones(1, 4, 18, 26))


def test_a_batch_of_pictures_is_tiled_together_and_each_has_its_own_noise() -> None:
    pipeline = tiny_pipeline(with_text=False)
    both = torch.cat([PICTURE, tiny_picture(18, 25, seed=1)])
    batch = run(pipeline, both, generator=[seeded(0), seeded(1)])
    for i in range(2):
        torch.testing.assert_close(
            batch[i : i + 1], run(pipeline, both[i : i + 1], generator=seeded(i)), atol=2e-4, rtol=0
        )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("could not create a primitive")],
)
def test_a_lack_of_memory_halves_batch_and_tile_and_goes_on(error: Exception, caplog: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    x, lq, embeds = unit_noise(1, 4, 24, 32), unit_noise(1, 4, 24, 32, seed=1), unit_noise(1, 12, 16)

    def with_little_memory(**batch: Tensor) -> Tensor:
        if batch["latents"].numel() > 4 * 12 * 12:
            raise error
        return prediction_of(pipeline)(**batch)

    whole = aggregation((24, 32), None)
    found = whole.predict(with_little_memory, x, lq, embeds, 0)
    assert whole.grid == TileGrid(tile=(8, 8), overlap=4)
    expected = aggregation((24, 32), whole.grid).predict(prediction_of(pipeline), x, lq, embeds, 0)
    assert torch.equal(found, expected)
    assert len(caplog.messages) == 2
    assert TileGrid(tile=(16, 16), overlap=4, batch_size=5).halved(2) == TileGrid(
        tile=(16, 16), overlap=4, batch_size=2
    )
    with pytest.raises(type(error)):
        aggregation((24, 32), TileGrid(tile=(4, 4))).predict(
            lambda **_: with_little_memory(latents=x), x, lq, embeds, 0
        )


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(**_: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    x = unit_noise(1, 4, 24, 32)
    with pytest.raises(RuntimeError, match="mat1"):
        aggregation((24, 32), None).predict(broken, x, x, unit_noise(1, 12, 16), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_px": "large"}, "tile_px='large' is given, expected 'auto', 'none' or a number"),
        ({"tile_px": 20.5}, "tile_px=20.5 is given, expected 'auto'"),
        ({"tile_px": 8}, "tile_px=8 is given, expected a multiple of 8, 16 or more, .* give 16"),
        ({"tile_px": 50}, "tile_px=50 is given, expected a multiple of 8, .* give 48 or 56"),
        ({"overlap_px": 48}, "overlap_px=48 is given for tiles of 48 pixels, expected a multiple of 4 from 0 to 44"),
        ({"overlap_px": 6}, "overlap_px=6 is given"),
        ({"overlap_px": -4}, "overlap_px=-4 is given"),
        ({"batch_size": 0}, "batch_size=0 is given, expected at least 1"),
    ],
)
def test_tiles_that_cannot_work_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(tiny_pipeline(with_text=False), **arguments)
    assert "\n" not in str(error.value)


def test_the_native_tile_is_what_the_unet_was_trained_on() -> None:
    assert native_tile(tiny_unet(sample_size=64)) == 64
    assert native_tile(tiny_unet(sample_size=(97, 128))) == 96
    chosen = choose_grid(tiny_unet(sample_size=64), 512, 768, 8)
    assert chosen == TileGrid(tile=(64, 64), overlap=16)


@pytest.mark.parametrize("w", [0.0, 0.5])
@pytest.mark.parametrize("vae_tile_px", [24, 512])
def test_a_tiled_picture_is_coded_as_a_whole_one(w: float, vae_tile_px: int) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pictures = (PICTURE, tiny_picture(18, 25, seed=1))
    images = [pipeline.prepare_image(View(picture * 2 - 1))[1] for picture in pictures]
    coder = PictureCoder(pipeline.vae, pipeline.cfw, tile_px=vae_tile_px)
    whole, whole_features = pipeline.encode(images, seeded(0), num_images_per_prompt=2)
    tiled, tiled_features = pipeline.encode(images, seeded(0), num_images_per_prompt=2, coder=coder)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    found = pipeline.decode(whole, tiled_features, w, coder)
    expected = pipeline.decode(whole, whole_features, w)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(assembled(one), assembled(other), atol=1e-4, rtol=0)


def test_the_pipeline_codes_in_the_mode_it_is_told() -> None:
    pipeline = tiny_pipeline(with_text=False)
    call = {"output_type": "pt", "w": 0.5, "vae_tile_px": 80}
    exact = run(pipeline, **call)
    windowed = run(pipeline, vae_attention="windowed", **call)
    approximate = run(pipeline, vae_mode="approximate", **call)
    torch.testing.assert_close(windowed, exact)  # the picture is smaller than a window
    assert 0 < (approximate - exact).abs().mean() < 0.1


@pytest.mark.parametrize("network", ["encoder", "decoder"])
@pytest.mark.parametrize("w", [0.0, 0.5])
def test_where_memory_lacks_for_the_whole_picture_it_is_coded_in_tiles(network: str, w: float, caplog: Any) -> None:
    pipeline = tiny_pipeline(with_text=False)
    pictures = torch.cat([PICTURE, tiny_picture(18, 25, seed=1)])
    call = {"tile_px": "none", "overlap_px": None, "vae_tile_px": None, "output_type": "pt", "w": w}
    expected = run(pipeline, pictures, num_images_per_prompt=2, **call)

    def lacking(_module: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].numel() > 100_000:  # two pictures whole have 119 808 values at the widest place
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for part in getattr(pipeline.vae, network).modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_pre_hook(lacking)
    found = run(pipeline, pictures, num_images_per_prompt=2, **call)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert caplog.messages[0] == "not enough memory for the autoencoder on the whole picture; going on in tiles"


def test_approximate_tiles_are_halved_only_down_to_their_smallest() -> None:
    vae = tiny_vae()
    coder = PictureCoder(vae, tile_px=256, mode="approximate")
    sizes = []

    def lacking(_module: Any, _args: Any) -> None:
        sizes.append(coder.tile_px)
        raise MemoryError

    vae.encoder.conv_in.register_forward_pre_hook(lacking)
    with pytest.raises(MemoryError):
        coder.encode([View(unit_noise(1, 3, 300, 300))], ())
    assert sizes == [256, 128] == [256, smallest_tile_px(vae, "approximate")]


def test_the_progress_bar_ends_at_its_total_after_tiles_were_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline(with_text=False)
    bars: list[Any] = []
    make_bar = pipeline.progress_bar

    def progress_bar(**options: Any) -> Any:
        bars.append(make_bar(**options))
        return bars[-1]

    def lacking_memory_later(_unet: Any, args: tuple[Tensor, ...]) -> None:
        if bars[0].n > 3 and args[0].shape[-1] > 8:
            raise MemoryError

    pipeline.set_progress_bar_config(file=io.StringIO())
    monkeypatch.setattr(pipeline, "progress_bar", progress_bar)
    pipeline.unet.register_forward_pre_hook(lacking_memory_later)
    run(pipeline, num_inference_steps=3)
    assert pipeline.aggregation.grid.tile == (6, 6)
    assert bars[0].n == bars[0].total


def test_an_unknown_mode_of_coding_is_refused() -> None:
    with pytest.raises(ConfigError, match="vae_mode='quick' is given, expected one of"):
        run(tiny_pipeline(with_text=False), vae_mode="quick")
