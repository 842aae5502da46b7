"""What the planner predicts is what runs need; budgets choose tiles, and are refused where nothing fits."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.plan import full_size_plan
from stablesr_kit import Job, Tiling
from stablesr_kit.errors import ConfigError, JobError
from stablesr_kit.imaging.canvas import Canvas
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.models.steering import steered_prediction
from stablesr_kit.tiling import memory
from stablesr_kit.tiling.autoencoder import AttentionMode, TiledAutoencoder
from stablesr_kit.tiling.latents import TileGrid
from stablesr_kit.tiling.memory import (
    LiveBytes,
    Plan,
    Planner,
    approximate_coding_costs,
    coding_costs,
    measured_rate,
    prediction_cost,
    weight_bytes,
    whole_coding_costs,
    without_values,
)
from tests.helpers.tiny import seeded, tiny_picture, tiny_pipeline, tiny_vae, unit_noise

PIPELINE = tiny_pipeline(with_text=False)
F32 = torch.float32


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
        steered_prediction(PIPELINE.unet, PIPELINE.adapter, latents, 500, latents, prompts, 2.0)
    assert counted.peak_bytes == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("tile_px", [32, 64])
@pytest.mark.parametrize("window", [None, 8])
def test_tiled_coding_holds_what_was_counted_without_values(tile_px: int, window: int | None, tmp_path: Path) -> None:
    vae, cfw = PIPELINE.vae, PIPELINE.cfw
    counted = coding_costs(without_values(vae, F32), without_values(cfw, F32), 128, 96, tile_px, window)
    attention = "global" if window is None else "windowed"
    coder = TiledAutoencoder(
        vae, cfw, tile_px=tile_px, attention=cast(AttentionMode, attention), window=window or 64, folder=tmp_path
    )
    image = Canvas.from_tensor(unit_noise(1, 3, 128, 96), tmp_path)
    z = Canvas.from_tensor(unit_noise(1, 4, 32, 24), tmp_path)
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


def test_coding_a_small_picture_whole_holds_what_was_counted_without_values() -> None:
    vae, cfw = PIPELINE.vae, PIPELINE.cfw
    *counted, kept = whole_coding_costs(without_values(vae, F32), without_values(cfw, F32), 64, 96, 2)
    image, z = unit_noise(2, 3, 64, 96), unit_noise(2, 4, 16, 24)
    with torch.no_grad(), LiveBytes() as encoding:
        _, features = encode_with_features(vae, image, cfw.config.levels)
    assert kept == sum(one.nbytes for one in features.values())
    with torch.no_grad(), LiveBytes() as decoding:
        decode_with_features(vae, cfw, z, features, 0.5)
    for cost, peak in zip(counted, (encoding.peak, decoding.peak + kept), strict=True):
        assert cost.peak_bytes == pytest.approx(peak, rel=0.1)


def test_coding_in_approximate_tiles_holds_what_was_counted_without_values(tmp_path: Path) -> None:
    vae, cfw = PIPELINE.vae, PIPELINE.cfw
    counted = approximate_coding_costs(without_values(vae, F32), without_values(cfw, F32), 256, 192, 128)
    coder = TiledAutoencoder(vae, cfw, tile_px=128, mode="approximate", folder=tmp_path)
    image = Canvas.from_tensor(unit_noise(1, 3, 256, 192), tmp_path)
    with LiveBytes() as encoding:
        _, features = coder.encode_with_features(image, cfw.config.levels)
    with LiveBytes() as decoding:
        coder.decode(unit_noise(1, 4, 64, 48), features, 0.5)
    for cost, live in zip(counted, (encoding, decoding), strict=True):
        assert live.peak / 2 < cost.peak_bytes <= live.peak  # which counts the canvases of one tile, in memory, too


def test_a_smaller_limit_gives_smaller_tiles_of_the_autoencoder_before_smaller_latents() -> None:
    limits = [40 * 10**6, 13 * 10**6, 6 * 10**6]
    plans = [PIPELINE.plan(256, 256, tiling=Tiling(max_memory=limit)) for limit in limits]
    for plan, limit in zip(plans, limits, strict=True):
        assert plan.peak_bytes <= limit == plan.max_memory
        assert plan.grid == TileGrid(tile=(16, 16), overlap=4)
        assert not plan.is_reduced
    assert [plan.vae_tile_px for plan in plans] == [256, 128, 64]
    assert "\n" not in str(plans[0])
    assert "1 at once, autoencoder tiles of 256 px, at most" in str(plans[0])


def test_where_the_latents_do_not_fit_smaller_ones_are_taken_and_said_to_change_the_picture() -> None:
    whole = PIPELINE.plan(128, 128, w=0)
    assert (whole.grid, whole.vae_tile_px, whole.max_memory) == (None, None, None)
    tiled = PIPELINE.plan(128, 128, w=0, tiling=Tiling(max_memory="4.2MB"))
    assert tiled.is_reduced
    assert tiled.grid is not None
    assert max(tiled.grid.tile) < 32
    assert "memory forces smaller tiles of latents than usual, which changes the picture" in str(tiled)


def test_what_is_given_is_kept_to_or_refused_in_one_line() -> None:
    given = {"tile_px": 64, "overlap_px": 8, "vae_tile_px": 96}
    for limit in ("1GiB", "13MB"):
        plan = PIPELINE.plan(256, 256, tiling=Tiling(max_memory=limit, **given))
        assert (plan.grid, plan.vae_tile_px) == (TileGrid(tile=(16, 16), overlap=2), 96)
    for refused in ({"vae_tile_px": 512}, {"tile_px": "none"}, {"tile_px": 256}):
        with pytest.raises(ConfigError, match=r"^8\.6 MiB of memory are too little, expected .* smaller") as error:
            PIPELINE.plan(256, 256, tiling=Tiling(max_memory="9MB", **refused))
        assert "\n" not in str(error.value)


def test_a_limit_too_small_for_anything_is_refused_in_one_line_and_too_little_free_memory_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"^1\.0 MiB of memory[^\n]* are weights\); allow more"):
        PIPELINE.plan(256, 256, tiling=Tiling(max_memory=2**20))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    weights = Planner(PIPELINE.vae, PIPELINE.unet, PIPELINE.adapter, PIPELINE.cfw).weights
    tried = PIPELINE.plan(256, 256)
    assert (tried.grid, tried.vae_tile_px) == (TileGrid(tile=(4, 4), overlap=2), 64)
    assert tried.peak_bytes > weights and tried.max_memory is None


@pytest.mark.parametrize("size", ["6", "six GB", "-1GB", "6XB", "infGB", "nanGB"])
def test_a_limit_that_is_no_size_is_refused_in_one_line(size: str) -> None:
    with pytest.raises(ConfigError, match=rf"^max_memory='{size}' is given, expected bytes or a size such as '6GB'"):
        Tiling(max_memory=size)


def test_sizes_are_decimal_or_binary_whatever_their_case() -> None:
    sizes = ["6GB", "6gb", "6GiB", "1.5 MB", 7]
    assert [Tiling(max_memory=size).allowed_bytes() for size in sizes] == [
        6 * 10**9,
        6 * 10**9,
        6 * 2**30,
        1_500_000,
        7,
    ]


def test_a_plan_is_read_as_it_was_saved_and_damage_is_one_line(tmp_path: Path) -> None:
    costs = {"peak_bytes": 7, "flops": 1e12, "attention_flops": 0.5, "seconds": 3.25}
    tiled = Plan(grid=TileGrid(tile=(16, 24), overlap=4), vae_tile_px=64, max_memory=9, **costs)
    for plan in (tiled, Plan(grid=None, vae_tile_px=None, **costs)):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(JobError, match=r"plan\.json: the plan cannot be read .*; start again") as error:
            Plan.load(tmp_path / "plan.json")
        assert "\n" not in str(error.value)


def test_a_call_keeps_to_its_limit_and_gives_the_same_picture(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, picture = tiny_pipeline(with_text=False), tiny_picture(40, 40)

    def restored(tiling: Tiling | None = None, **options: Any) -> Tensor:
        return pipeline(picture, generator=seeded(0), output_type="pt", tiling=tiling, **options).images

    expected = restored(Tiling(tile_px=64, vae_tile_px=512))
    torch.testing.assert_close(restored(Tiling(max_memory="5.2MB")), expected, atol=1e-4, rtol=0)
    assert pipeline.coder.tile_px == 64
    assert not caplog.messages
    picture = tiny_picture(32, 32)
    plan = pipeline.plan(128, 128, tiling=Tiling(max_memory="4.2MB"), w=0)
    reduced = restored(Tiling(max_memory="4.2MB"), w=0)
    assert len(caplog.messages) == 1
    assert "memory forces smaller tiles of latents than usual" in caplog.messages[0]
    assert torch.equal(restored(job=Job(plan=plan), w=0), reduced)


def test_a_small_picture_is_whole_without_a_limit_and_may_be_coded_in_tiles_under_one() -> None:
    pipeline, picture = tiny_pipeline(with_text=False), tiny_picture(24, 24)
    options = {"output_type": "pt", "w": 0.5}
    whole = pipeline(picture, generator=seeded(0), **options).images
    assert (pipeline.aggregation.grid, pipeline.coder.tile_px) == (TileGrid(tile=(24, 24)), None)
    coded_in_tiles = pipeline(picture, generator=seeded(0), tiling=Tiling(max_memory="4MB"), **options).images
    assert (pipeline.aggregation.grid, pipeline.coder.tile_px) == (TileGrid(tile=(24, 24)), 64)
    torch.testing.assert_close(coded_in_tiles, whole, atol=1e-4, rtol=0)


def test_full_size_networks_restore_24_megapixels_in_eight_gigabytes() -> None:
    plan = full_size_plan(4096, 6144, 8 * 10**9, torch.float16, 50)
    assert plan.grid.tile == (64, 64)
    assert 2.5e9 < plan.peak_bytes < 8e9


def test_the_rate_of_the_device_is_measured() -> None:
    assert measured_rate(torch.device("cpu"), F32) > 1e6


def test_quantised_weights_count_as_what_they_are_stored_as() -> None:
    linear = torch.nn.Linear(32, 8, bias=False)
    stored = TwoTensor(
        *(torch.zeros(8, 32, dtype=torch.int8) for _ in range(2))
    )  # as torchao's: a tensor made of two others
    linear.weight = torch.nn.Parameter(stored, requires_grad=False)
    assert weight_bytes(linear) == 2 * 8 * 32
