"""What the planner predicts is what runs need; budgets choose tiles, and are refused where nothing fits."""

from pathlib import Path
from typing import cast

import pytest
import torch

from benchmarks.plan import full_size_plan
from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.pipelines.aggregation import LatentTiling
from stablesr_kit.pipelines.costs import LiveBytes, coding_costs, prediction_cost, without_values
from stablesr_kit.pipelines.memory_plan import GIB, Planner, measured_rate
from stablesr_kit.pipelines.sampling import Sampling
from stablesr_kit.pipelines.tiled_autoencoder import AttentionMode, TiledAutoencoder
from tests.tiny import tiny_pipeline, tiny_vae, unit_noise

PIPELINE = tiny_pipeline(with_text=False)
F32 = torch.float32


def planner() -> Planner:
    return Planner(PIPELINE.vae, PIPELINE.unet, PIPELINE.adapter, PIPELINE.cfw)


def test_live_bytes_are_those_of_tensors_that_are_made_and_not_yet_let_go() -> None:
    given = torch.ones(1000)
    with LiveBytes() as live:
        kept = given + 1
        (kept * 2).sum()
        kept.view(10, 100)
        given.view(10, 100)
    assert live.live == 4000 and 8000 <= live.peak <= 8008


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_prediction_holds_what_was_counted_without_values(batch_size: int, branches: int) -> None:
    unet, adapter = (without_values(network, F32) for network in (PIPELINE.unet, PIPELINE.adapter))
    counted = prediction_cost(unet, adapter, (16, 16), batch_size, branches)
    latents = unit_noise(batch_size, 4, 16, 16)
    prompts = unit_noise(branches * batch_size, 77, unet.config.cross_attention_dim)
    with torch.no_grad(), LiveBytes() as live:
        Sampling.predict(PIPELINE, latents, 500, latents, prompts, 2.0)
    assert counted.peak_bytes == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("tile_px", [32, 64])
@pytest.mark.parametrize("window", [None, 8])
def test_tiled_coding_holds_what_was_counted_without_values(tile_px: int, window: int | None, tmp_path: Path) -> None:
    vae, cfw = PIPELINE.vae, PIPELINE.cfw
    counted = coding_costs(without_values(vae, F32), without_values(cfw, F32), 256, 192, tile_px, window)
    attention = "global" if window is None else "windowed"
    coder = TiledAutoencoder(
        vae, cfw, tile_px=tile_px, attention=cast(AttentionMode, attention), window=window or 64, folder=tmp_path
    )
    image = Canvas.from_tensor(unit_noise(1, 3, 256, 192), tmp_path)
    z = Canvas.from_tensor(unit_noise(1, 4, 64, 48), tmp_path)
    with LiveBytes() as encoding:
        _, features = coder.encode_with_features(image, cfw.config.levels)
    with LiveBytes() as decoding:
        coder.decode(z, features, 0.5)
    for cost, live in zip(counted, (encoding, decoding), strict=True):
        assert cost.peak_bytes == pytest.approx(live.peak, rel=0.1)


def test_global_attention_costs_the_square_of_the_picture_and_windows_its_size() -> None:
    vae = without_values(tiny_vae(), F32)
    small, large = (coding_costs(vae, None, side, side, 64)[1].flops for side in (256, 1024))
    assert large > 40 * small
    small, large = (coding_costs(vae, None, side, side, 64, window=8)[1].flops for side in (256, 1024))
    assert large == pytest.approx(16 * small, rel=0.05)


def test_a_smaller_budget_gives_smaller_tiles_and_keeps_to_itself() -> None:
    wanted = LatentTiling(tile=(64, 64), overlap=16)
    plans = [planner().plan(512, 512, wanted, 2, budget) for budget in (GIB, GIB // 16, GIB // 128)]
    for plan, budget in zip(plans, (GIB, GIB // 16, GIB // 128), strict=True):
        assert plan.peak_bytes <= budget
    sizes = [(plan.tiling.tile[0] ** 2 * plan.tiling.batch_size, plan.vae_tile_px) for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]
    assert "\n" not in str(plans[0]) and "GiB on the device" in str(plans[0])


def test_a_budget_too_small_for_anything_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^0\.00 GiB of memory[^\n]* are too few, expected at least") as error:
        planner().plan(512, 512, LatentTiling(tile=(64, 64), overlap=16), 2, 2**20)
    assert "\n" not in str(error.value)


def test_full_size_networks_restore_24_megapixels_in_eight_gigabytes() -> None:
    plan = full_size_plan(4096, 6144, 8 * 10**9, torch.float16, 50)
    assert plan.tiling.tile == (64, 64)
    assert 2.5e9 < plan.peak_bytes < 8e9


def test_the_rate_of_the_device_is_measured() -> None:
    assert measured_rate(torch.device("cpu"), F32) > 1e6
