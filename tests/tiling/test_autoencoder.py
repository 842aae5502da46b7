"""The tiled autoencoder is the untiled one: any config, any size, any tile, with and without CFW."""

import gc
import random
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.canvas import Canvas, Region
from stablesr_kit.models import execution
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
from stablesr_kit.tiling.autoencoder import TiledAutoencoder
from stablesr_kit.tiling.scratch import Moments
from tests.helpers.file_limits import open_files
from tests.helpers.tiny import tiny_cfw, tiny_vae, unit_noise

EXACT = 1e-4
PRIMES = [11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]


def random_config(rng: random.Random) -> dict[str, Any]:
    levels = rng.choice([2, 3, 4])
    norm_num_groups = rng.choice([1, 2, 4, 8])
    return {
        "levels": levels,
        "block_out_channels": tuple(8 * rng.choice([1, 2, 3]) for _ in range(levels)),
        "layers_per_block": rng.choice([1, 2]),
        "norm_num_groups": norm_num_groups,
        "mid_block_add_attention": rng.random() < 0.5,
        "latent_channels": rng.choice([3, 4, 16]),
        "use_quant_conv": rng.random() < 0.5,
        "use_post_quant_conv": rng.random() < 0.5,
    }


def largest_difference(canvas: Canvas, expected: Tensor) -> float:
    assert canvas.shape == expected.shape[1:]
    return (canvas.to_tensor() - expected).abs().max().item()


def random_tile_px(rng: random.Random, factor: int, height: int, width: int) -> int:
    """From a quarter of the picture to more than all of it: small tiles only where they stay few."""
    return max(rng.randint(min(height, width) // 4, max(height, width) + 8), factor)


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_any_config_size_and_tile_gives_the_untiled_result(seed: int) -> None:
    rng = random.Random(seed)
    vae = tiny_vae(**random_config(rng))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    levels = tuple(range(len(vae.config.block_out_channels)))
    height, width = rng.sample(PRIMES, 2)
    image = unit_noise(1, 3, height, width, seed=seed).clamp(-1, 1)
    tile_px = random_tile_px(rng, factor, height, width)
    posterior, features = encode_with_features(vae, image, levels)

    tiled = TiledAutoencoder(vae, tile_px=tile_px)
    moments, tiled_features = tiled.encode_with_features(image, levels)
    assert largest_difference(moments, posterior.parameters) <= EXACT
    for level in levels:
        assert largest_difference(tiled_features[level], features[level]) <= EXACT
    assert largest_difference(tiled.decode(posterior.mean), vae.decode(posterior.mean).sample) <= EXACT


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_fused_levels_size_and_tile_give_the_untiled_cfw(seed: int, tmp_path: Path) -> None:
    rng = random.Random(100 + seed)
    config = random_config(rng)
    vae = tiny_vae(**config)
    factor = 2 ** (config["levels"] - 1)
    fused = tuple(sorted(rng.sample(range(config["levels"]), 2)))
    cfw = tiny_cfw(vae, levels=fused, num_rrdb=rng.choice([1, 2]))
    height, width = (factor * rng.choice([3, 5, 7]) for _ in range(2))
    image = unit_noise(1, 3, height, width, seed=seed).clamp(-1, 1)
    tile_px = random_tile_px(rng, factor, height, width)
    posterior, features = encode_with_features(vae, image, fused)

    tiled = TiledAutoencoder(vae, cfw, tile_px=tile_px, folder=tmp_path if seed % 2 else None)
    _, tiled_features = tiled.encode_with_features(image, fused)
    plain = vae.decode(posterior.mean).sample
    for w in (0.0, 0.5, 1.0):  # the features serve again and again
        expected = decode_with_features(vae, cfw, posterior.mean, features, w)
        assert (expected - plain).abs().max() > 1e-3 or w == 0
        assert largest_difference(tiled.decode(posterior.mean, tiled_features, w), expected) <= EXACT


@torch.no_grad()
def test_channels_last_networks_with_norms_for_large_pictures_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `from_pretrained` loads them, on the CPU, with tiles large enough for those norms."""
    monkeypatch.setattr(execution, "LARGE", 16)
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    execution.to_channels_last(vae)
    execution.to_channels_last(cfw)
    image = 0.5 + unit_noise(1, 3, 40, 56) / 4
    tiled = TiledAutoencoder(vae, cfw, tile_px=24)
    posterior, features = encode_with_features(vae, image, (1, 2))
    moments, tiled_features = tiled.encode_with_features(image, (1, 2))
    torch.testing.assert_close(moments.to_tensor(), posterior.parameters, atol=1e-4, rtol=0)
    z = posterior.mode()
    expected = decode_with_features(vae, cfw, z, features, 0.5)
    torch.testing.assert_close(tiled.decode(z, tiled_features, 0.5).to_tensor(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_tiles_of_one_latent_position_are_exact() -> None:
    vae = tiny_vae(levels=2)
    image = unit_noise(1, 3, 11, 9)
    posterior = vae.encode(image).latent_dist
    tiled = TiledAutoencoder(vae, tile_px=2)
    assert largest_difference(tiled.encode(image), posterior.parameters) <= EXACT
    assert largest_difference(tiled.decode(posterior.mean), vae.decode(posterior.mean).sample) <= EXACT


@torch.no_grad()
def test_a_picture_far_from_zero_is_exact() -> None:
    """Sums of squares would lose the variance of such maps in float32."""
    vae = tiny_vae(levels=2)
    vae.encoder.conv_in.bias.add_(100.0)
    image = unit_noise(1, 3, 24, 20) * 0.1
    expected = vae.encode(image).latent_dist.parameters
    assert largest_difference(TiledAutoencoder(vae, tile_px=8).encode(image), expected) <= EXACT


def test_moments_of_tiles_are_those_of_the_whole() -> None:
    whole = unit_noise(1, 6, 13, 11).double() * 0.01 + torch.arange(6).view(1, 6, 1, 1) * 100
    whole = whole.float()
    moments = Moments()
    for tile in (whole[..., :5, :], whole[..., 5:, :1], whole[..., 5:, 1:]):
        moments.add(tile)
    grouped = whole.double().view(3, -1)
    mean, variance = moments.of_groups(3)
    torch.testing.assert_close(mean, grouped.mean(1).repeat_interleave(2), rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, grouped.var(1, correction=0).repeat_interleave(2), rtol=1e-9, atol=0)


@torch.no_grad()
def test_windowed_attention_does_not_depend_on_the_tiles() -> None:
    vae = tiny_vae(levels=2)
    z = unit_noise(1, 4, 23, 17)
    images = [TiledAutoencoder(vae, tile_px=px, attention="windowed", window=8).decode(z) for px in (6, 13, 64)]
    for image in images[1:]:
        assert largest_difference(image, images[0].to_tensor()) <= 1e-5
    assert largest_difference(images[0], vae.decode(z).sample) > 1e-3


@torch.no_grad()
def test_a_window_that_holds_the_whole_map_is_global_attention() -> None:
    vae = tiny_vae(levels=2)
    z = unit_noise(1, 4, 9, 12)
    image = TiledAutoencoder(vae, tile_px=8, attention="windowed", window=12).decode(z)
    assert largest_difference(image, vae.decode(z).sample) <= EXACT


@torch.no_grad()
def test_the_networks_are_left_as_they_were() -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    before = {name: value.clone() for name, value in (vae.state_dict() | cfw.state_dict()).items()}
    modules = [(type(part), dict(vars(part))) for part in [*vae.modules(), *cfw.modules()]]
    tiled = TiledAutoencoder(vae, cfw, tile_px=16)
    moments, features = tiled.encode_with_features(unit_noise(1, 3, 24, 32), (1, 2))
    tiled.decode(moments.to_tensor()[:, :4], features, 0.5)
    assert [(type(part), dict(vars(part))) for part in [*vae.modules(), *cfw.modules()]] == modules
    after = vae.state_dict() | cfw.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@torch.no_grad()
def test_anything_that_reads_like_a_canvas_is_encoded() -> None:
    class Gradient:
        shape = (3, 40, 24)

        def read(self, region: Region) -> Tensor:
            rows = torch.arange(region.top, region.bottom).view(1, 1, -1, 1) / 20 - 1
            columns = torch.arange(region.left, region.right).view(1, 1, 1, -1) / 12 - 1
            return (rows * columns).expand(1, 3, -1, -1)

    vae = tiny_vae()
    expected = vae.encode(Gradient().read(Region(0, 0, 40, 24))).latent_dist.parameters
    assert largest_difference(TiledAutoencoder(vae, tile_px=16).encode(Gradient()), expected) <= EXACT


@torch.no_grad()
def test_only_what_is_returned_is_still_on_disk(tmp_path: Path) -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    tiled = TiledAutoencoder(vae, cfw, tile_px=32, folder=tmp_path)
    moments, features = tiled.encode_with_features(unit_noise(1, 3, 16, 16), (1, 2))
    gc.collect()
    assert len(open_files(tmp_path)) == 3
    z = moments.to_tensor()[:, :4]
    features[1].close()
    with pytest.raises(ValueError, match="the canvas is closed"):
        tiled.decode(z, features, 1.0)
    gc.collect()
    assert len(open_files(tmp_path)) == 2


def test_offloading_hooks_bring_the_networks_to_their_device() -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    image = unit_noise(1, 3, 16, 16)
    expected = encode_with_features(vae, image, ())[0].parameters
    calls = []

    class Noting(accelerate.hooks.ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    for network in (vae, cfw):
        hook = Noting()
        accelerate.hooks.add_hook_to_module(network, hook)
    tiled = TiledAutoencoder(vae, cfw, tile_px=16)
    moments, features = tiled.encode_with_features(image, (1, 2))
    assert largest_difference(moments, expected) <= EXACT
    assert calls == [vae]
    tiled.decode(moments.to_tensor()[:, :4], features, 1.0)
    assert calls == [vae, vae, cfw]


@torch.no_grad()
def test_half_precision_stays_near_float32() -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    image = unit_noise(1, 3, 24, 24).clamp(-1, 1)
    posterior, features = encode_with_features(vae, image, (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mean, features, 1.0)
    tiled = TiledAutoencoder(vae.bfloat16(), cfw.bfloat16(), tile_px=16, canvas_dtype=torch.bfloat16)
    _, tiled_features = tiled.encode_with_features(image, (1, 2))
    decoded = tiled.decode(posterior.mean, tiled_features, 1.0)
    assert 0 < largest_difference(decoded, expected) < 0.1 * expected.abs().max()


def unknown_blocks() -> AutoencoderKL:
    return tiny_vae(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    )


def test_what_cannot_be_tiled_is_refused_in_one_line() -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae)
    with pytest.raises(ConfigError, match="tile_px=2 is smaller than one latent position; give at least 4"):
        TiledAutoencoder(vae, tile_px=2)
    with pytest.raises(ConfigError, match="attention='local' is given"):
        TiledAutoencoder(vae, attention="local")
    with pytest.raises(ConfigError, match="mode='fast' is given"):
        TiledAutoencoder(vae, mode="fast")
    with pytest.raises(ConfigError, match="tile_px=64 leaves nothing between the halos .* give at least 128"):
        TiledAutoencoder(vae, tile_px=64, mode="approximate")
    with pytest.raises(ConfigError, match="window=1 is given"):
        TiledAutoencoder(vae, window=1)
    with pytest.raises(ConfigError, match="has a AttnDownEncoderBlock2D, which cannot be tiled exactly"):
        TiledAutoencoder(unknown_blocks())
    tiled = TiledAutoencoder(vae, cfw, tile_px=16)
    with pytest.raises(
        ValueError, match="an image of 3 x 3 x 16 is given, expected 3 channels and sides of at least 4"
    ):
        tiled.encode(torch.zeros(1, 3, 3, 16))
    with pytest.raises(ValueError, match=r"expected \(1, C, H, W\)"):
        tiled.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"features of levels \(5,\) are asked for"):
        tiled.encode_with_features(torch.zeros(1, 3, 16, 16), (5,))
    _, features = tiled.encode_with_features(torch.zeros(1, 3, 16, 16), (1, 2))
    with pytest.raises(ValueError, match="z has 3 channels, expected 4"):
        tiled.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="w=1.0 needs cfw and the features"):
        tiled.decode(torch.zeros(1, 4, 4, 4), w=1.0)
    with pytest.raises(ValueError, match=r"features of level 1 are \(16, 8, 8\), expected \(16, 10, 8\)"):
        tiled.decode(torch.zeros(1, 4, 5, 4), features, 1.0)
    with pytest.raises(ValueError, match="features of level 2 are nothing"):
        tiled.decode(torch.zeros(1, 4, 4, 4), {1: features[1]}, 1.0)


@pytest.mark.parametrize("size", [(70, 51), (96, 40)])
@torch.no_grad()
def test_the_approximate_mode_is_near_and_exact_if_one_tile_holds_the_picture(size: tuple[int, int]) -> None:
    vae = tiny_vae(levels=2, mid_block_add_attention=False)
    cfw = tiny_cfw(vae, levels=(1,))
    image = torch.nn.functional.interpolate(unit_noise(1, 3, 6, 5), size, mode="bicubic")
    posterior, features = encode_with_features(vae, image, (1,))
    errors = []
    for tile_px in (36, 44, 400):
        tiled = TiledAutoencoder(vae, cfw, tile_px=tile_px, mode="approximate")
        moments, tiled_features = tiled.encode_with_features(image, (1,))
        assert largest_difference(tiled_features[1], features[1]) <= EXACT
        assert largest_difference(moments, posterior.parameters) <= (EXACT if tile_px == 400 else 0.02)
    if size[1] % 2 == 0:
        expected = decode_with_features(vae, cfw, posterior.mean, features, 1.0)
        for tile_px in (36, 400):
            tiled = TiledAutoencoder(vae, cfw, tile_px=tile_px, mode="approximate")
            errors.append(largest_difference(tiled.decode(posterior.mean, features_canvases(features), 1.0), expected))
        assert errors[1] <= EXACT  # one tile holds it all
        assert errors[0] < 0.03 * expected.abs().max()


def features_canvases(features: dict[int, Tensor]) -> dict[int, Canvas]:
    return {level: Canvas.from_tensor(values) for level, values in features.items()}


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@torch.no_grad()
def test_the_device_sees_tensors_of_one_size_however_large_the_picture(mode: Any) -> None:
    """The largest input or output of any layer, counted, stays within 15% for four times the picture."""
    vae = tiny_vae(levels=2, layers_per_block=1, mid_block_add_attention=mode == "exact")
    largest = 0

    def count(_module: Any, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        largest = max(largest, *(value.numel() for value in (*args, output) if isinstance(value, Tensor)))

    for part in vae.modules():
        if not list(part.children()):
            part.register_forward_hook(count)
    peaks = []
    for side in (96, 192):
        largest = 0
        tiled = TiledAutoencoder(vae, tile_px=48, mode=mode, attention="windowed", window=16)
        moments = tiled.encode(unit_noise(1, 3, side, side + 32))
        tiled.decode(moments.to_tensor()[:, :4])
        peaks.append(largest)
    assert 0 < peaks[1] <= 1.15 * peaks[0]
