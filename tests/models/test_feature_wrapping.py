"""CFW beside a stock autoencoder: nothing at w = 0, the formula elsewhere, and hooks that fire."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, UserCpuOffloadHook, add_hook_to_module
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from stablesr_kit import ControllableFeatureWrapping
from stablesr_kit.errors import ConfigError
from stablesr_kit.models.feature_wrapping import check_autoencoder, decode_with_features, encode_with_features
from tests.helpers.offloads import OFFLOADS
from tests.helpers.tiny import tiny_cfw, tiny_vae, unit_noise

VAES = pytest.mark.parametrize(
    ("vae_config", "levels"),
    [
        pytest.param({"levels": 3}, (1, 2), id="three-levels"),
        pytest.param({"levels": 4}, (1, 2), id="four-levels"),
        pytest.param({"levels": 4, "layers_per_block": 2}, (0, 3), id="outermost-levels"),
        pytest.param({"use_quant_conv": False, "use_post_quant_conv": False}, (2,), id="no-quant-conv"),
        pytest.param({"mid_block_add_attention": False, "latent_channels": 8}, (1,), id="no-attention"),
    ],
)


def networks(vae_config: dict[str, Any], levels: tuple[int, ...]) -> tuple[AutoencoderKL, ControllableFeatureWrapping]:
    vae = tiny_vae(**vae_config)
    return vae, tiny_cfw(vae, levels=levels)


def picture_for(vae: AutoencoderKL) -> Tensor:
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    return unit_noise(2, 3, 2 * side, 3 * side).clamp(-1, 1)


@contextmanager
def wrapped(
    vae: AutoencoderKL, cfw: ControllableFeatureWrapping, features: dict[int, Tensor], w: float
) -> Iterator[None]:
    """A stock decoder to which the corrections are added by hooks."""
    handles = []
    for level in cfw.config.levels:
        block = vae.decoder.up_blocks[len(vae.config.block_out_channels) - 1 - level]

        def add(_module: Any, _args: Any, h: Tensor, level: int = level) -> Tensor:
            return h + w * cfw.fusion_layers[str(level)](features[level], h)

        handles.append(block.resnets[-1].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@VAES
@torch.no_grad()
def test_encoding_with_features_is_the_stock_encoding_to_the_bit(
    vae_config: dict[str, Any], levels: tuple[int, ...]
) -> None:
    vae, _ = networks(vae_config, levels)
    seen = {}
    for level in levels:
        block = vae.encoder.down_blocks[level]
        block.resnets[-1].register_forward_hook(lambda _m, _a, h, level=level: seen.update({level: h}))
    picture = picture_for(vae)
    expected = vae.encode(picture).latent_dist
    posterior, features = encode_with_features(vae, picture, levels)
    assert torch.equal(posterior.parameters, expected.parameters)
    assert sorted(features) == sorted(levels)
    for level in levels:
        assert torch.equal(features[level], seen[level])
        sides = (picture.shape[2] // 2**level, picture.shape[3] // 2**level)
        assert features[level].shape == (2, vae.config.block_out_channels[level], *sides)


@VAES
@torch.no_grad()
def test_w_zero_is_the_stock_decoding_to_the_bit(vae_config: dict[str, Any], levels: tuple[int, ...]) -> None:
    vae, cfw = networks(vae_config, levels)
    posterior, features = encode_with_features(vae, picture_for(vae), levels)
    expected = vae.decode(posterior.mode()).sample
    assert torch.equal(decode_with_features(vae, cfw, posterior.mode(), features, 0.0), expected)


@VAES
@pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_the_correction_enters_after_the_residual_blocks_of_its_level(
    vae_config: dict[str, Any], levels: tuple[int, ...], w: float
) -> None:
    vae, cfw = networks(vae_config, levels)
    posterior, features = encode_with_features(vae, picture_for(vae), levels)
    z = posterior.mode()
    with wrapped(vae, cfw, features, w):
        expected = vae.decode(z).sample
    assert (expected - vae.decode(z).sample).abs().max() > 1e-3
    torch.testing.assert_close(decode_with_features(vae, cfw, z, features, w), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_larger_w_the_farther_from_the_plain_decoding() -> None:
    vae, cfw = networks({}, (1, 2))
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    z = posterior.mode()
    plain = vae.decode(z).sample
    weights = (0.1, 0.3, 0.5, 1.0, 1.5)
    distances = [(decode_with_features(vae, cfw, z, features, w) - plain).norm().item() for w in weights]
    assert distances == sorted(distances) and distances[0] > 0


@torch.no_grad()
def test_the_correction_of_a_level_is_linear_in_w() -> None:
    cfw = tiny_cfw(tiny_vae())
    theirs, ours = unit_noise(2, 16, 4, 4), unit_noise(2, 16, 4, 4, seed=1)
    correction = cfw(1, theirs, ours, 1.0) - ours
    assert correction.abs().max() > 0.1
    for w in (0.0, 0.3, 2.0):
        torch.testing.assert_close(cfw(1, theirs, ours, w), ours + w * correction, atol=1e-5, rtol=0)


def test_in_place_without_gradients_it_gives_the_same_bits() -> None:
    vae, cfw = networks({}, (1, 2))
    encoder_features, decoder_features = (unit_noise(1, 16, 8, 8, seed=seed) for seed in (1, 2))
    kept = encoder_features.clone(), decoder_features.clone()
    expected = cfw(1, encoder_features, decoder_features, 0.7)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(cfw(1, encoder_features, decoder_features, 0.7), expected)
    assert torch.equal(encoder_features, kept[0]) and torch.equal(decoder_features, kept[1])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for use_checkpointing in (False, True):
        vae, cfw = networks({}, (1, 2))
        vae.requires_grad_(False)
        if use_checkpointing:
            cfw.enable_gradient_checkpointing()
        posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
        decode_with_features(vae, cfw, posterior.mode(), features, 1.0).square().mean().backward()
        gradients.append([parameter.grad for parameter in cfw.parameters()])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_rrdb", [2, 4])
def test_a_grown_cfw_starts_as_the_one_it_grew_from(num_rrdb: int) -> None:
    vae = tiny_vae()
    cfw = tiny_cfw(vae, num_rrdb=1)
    grown = cfw.grown(num_rrdb)
    posterior, features = encode_with_features(vae, picture_for(vae), cfw.config.levels)
    z = posterior.mean
    before, after = (decode_with_features(vae, one, z, features, 1.0) for one in (cfw, grown))
    assert grown.config.num_rrdb == num_rrdb
    assert (before - vae.decode(z).sample).abs().max() > 1e-2
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_cfw_does_not_shrink() -> None:
    with pytest.raises(ConfigError, match="num_rrdb=1 is given, expected at least the 2"):
        tiny_cfw(tiny_vae(), num_rrdb=2).grown(1)


def test_a_saved_cfw_wraps_the_same(tmp_path: Path) -> None:
    cfw = tiny_cfw(tiny_vae())
    cfw.save_pretrained(tmp_path, variant="fp16")
    loaded = ControllableFeatureWrapping.from_pretrained(tmp_path, variant="fp16")
    theirs, ours = unit_noise(1, 16, 4, 4), unit_noise(1, 16, 4, 4, seed=1)
    torch.testing.assert_close(loaded(1, theirs, ours, 0.7), cfw(1, theirs, ours, 0.7), atol=1e-5, rtol=0)
    assert list(loaded.config.levels) == [1, 2]
    half = ControllableFeatureWrapping.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@torch.no_grad()
def test_a_cfw_may_have_another_precision_than_the_autoencoder() -> None:
    vae, cfw = networks({}, (1, 2))
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    image = decode_with_features(vae, cfw.bfloat16(), posterior.mode(), features, 1.0)
    assert image.dtype == torch.float32
    assert 0 < (image - expected).abs().max() < 0.1 * expected.abs().max()


class Counter(ModelHook):
    """Counts the calls that would bring a module to its device."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG002
        self.calls += 1
        return args, kwargs


@torch.no_grad()
def test_offloading_hooks_of_the_autoencoder_and_of_cfw_fire() -> None:
    vae, cfw = networks({}, (1, 2))
    on_vae, on_cfw = Counter(), Counter()
    add_hook_to_module(vae, on_vae)
    add_hook_to_module(cfw, on_cfw)
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    assert on_vae.calls == 1
    decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    assert on_vae.calls == 2
    assert on_cfw.calls == 2  # once per fused level


class Recorder(UserCpuOffloadHook):
    """The hook of a module that seems to be on another device; counts how often it is asked to leave it."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1, device="meta"), CpuOffload(torch.device("cpu")))
        self.offloads = 0

    def offload(self) -> None:
        self.offloads += 1


@torch.no_grad()
def test_encoding_and_decoding_push_the_module_before_them_off_the_device() -> None:
    vae, cfw = networks({}, (1, 2))
    before = Recorder()
    accelerate.cpu_offload_with_hook(vae, torch.device("cpu"), prev_module_hook=before)
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    assert before.offloads == 1
    decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    assert before.offloads == 2


@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_offloaded_networks_give_the_same_to_the_bit(offload: str, tmp_path: Path) -> None:
    vae, cfw = networks({}, (1, 2))
    picture = picture_for(vae)
    posterior, features = encode_with_features(vae, picture, (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    OFFLOADS[offload](vae, tmp_path / "vae")
    OFFLOADS[offload](cfw, tmp_path / "cfw")
    posterior, features = encode_with_features(vae, picture, (1, 2))
    assert torch.equal(decode_with_features(vae, cfw, posterior.mode(), features, 1.0), expected)


@torch.no_grad()
def test_an_autoencoder_that_slices_the_batch_gives_the_same() -> None:
    vae, cfw = networks({}, (1, 2))
    picture = unit_noise(3, 3, 16, 24).clamp(-1, 1)
    posterior, features = encode_with_features(vae, picture, (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    vae.enable_slicing()
    sliced, sliced_features = encode_with_features(vae, picture, (1, 2))
    torch.testing.assert_close(sliced.parameters, posterior.parameters, atol=1e-5, rtol=0)
    for level, maps in features.items():
        torch.testing.assert_close(sliced_features[level], maps, atol=1e-5, rtol=0)
    found = decode_with_features(vae, cfw, sliced.mode(), sliced_features, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_autoencoder_that_would_tile_is_refused_where_features_are_needed() -> None:
    vae, cfw = networks({"sample_size": 16}, (1, 2))
    picture = unit_noise(1, 3, 16, 24).clamp(-1, 1)
    posterior, features = encode_with_features(vae, picture, (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    vae.enable_tiling()
    with pytest.raises(ConfigError, match="16 x 24 is larger than its tile of 16.*call vae.disable_tiling()"):
        encode_with_features(vae, picture, (1, 2))
    with pytest.raises(ConfigError, match="4 x 6 is larger than its tile of 4.*call vae.disable_tiling()"):
        decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    assert torch.equal(encode_with_features(vae, picture, ())[0].parameters, vae.encode(picture).latent_dist.parameters)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    _, features = encode_with_features(vae, picture, (1, 2))
    assert torch.equal(decode_with_features(vae, cfw, posterior.mode(), features, 1.0), expected)


COMPILED: dict[str, Callable[[AutoencoderKL], object]] = {
    "method": lambda vae: setattr(vae, "decode", torch.compile(vae.decode, backend="eager")),
    "decoder": lambda vae: setattr(vae, "decoder", torch.compile(vae.decoder, backend="eager")),
    "decoder in place": lambda vae: vae.decoder.compile(backend="eager"),
    "a block": lambda vae: vae.decoder.up_blocks[1].compile(backend="eager"),
    "a residual block": lambda vae: vae.decoder.up_blocks[1].resnets[-1].compile(backend="eager"),
}


@pytest.mark.parametrize("part", COMPILED)
@torch.no_grad()
def test_a_compiled_decoder_is_refused_before_it_runs(part: str) -> None:
    vae, cfw = networks({}, (1, 2))
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    COMPILED[part](vae)
    with pytest.raises(ConfigError, match="decoder is compiled, which hides its features from CFW; give"):
        decode_with_features(vae, cfw, posterior.mode(), features, 1.0)


@torch.no_grad()
def test_an_autoencoder_whose_forward_alone_is_compiled_and_a_compiled_cfw_give_the_same() -> None:
    vae, cfw = networks({}, (1, 2))
    picture = picture_for(vae)
    posterior, features = encode_with_features(vae, picture, (1, 2))
    expected = decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    whole: Any = torch.compile(vae, backend="eager")
    posterior, features = encode_with_features(whole, picture, (1, 2))
    assert torch.equal(decode_with_features(whole, cfw, posterior.mode(), features, 1.0), expected)
    compiled: Any = torch.compile(cfw, fullgraph=True, backend="eager")
    found = decode_with_features(whole, compiled, posterior.mode(), features, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_an_autoencoder_that_checkpoints_gradients_is_refused_in_training() -> None:
    vae, cfw = networks({}, (1, 2))
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    vae.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="call vae.disable_gradient_checkpointing()"):
        decode_with_features(vae, cfw, posterior.mode(), features, 1.0)
    with torch.no_grad():
        decode_with_features(vae, cfw, posterior.mode(), features, 1.0)


@torch.no_grad()
def test_threads_that_share_an_autoencoder_do_not_see_each_others_features() -> None:
    vae, cfw = networks({}, (1, 2))
    pictures = [unit_noise(1, 3, 16, 16, seed=seed).clamp(-1, 1) for seed in range(2)]

    def restored(picture: Tensor, w: float) -> Tensor:
        with torch.no_grad():  # grad mode belongs to a thread
            posterior, features = encode_with_features(vae, picture, (1, 2))
            return decode_with_features(vae, cfw, posterior.mode(), features, w)

    def stock(picture: Tensor, _w: float) -> Tensor:
        with torch.no_grad():
            return vae.decode(vae.encode(picture).latent_dist.mode()).sample

    runs = [(restored, pictures[0], 1.0), (restored, pictures[1], 0.5), (stock, pictures[1], 0.0)]
    expected = [run(picture, w) for run, picture, w in runs]

    def wrong(i: int) -> int:
        run, picture, w = runs[i]
        return sum(not torch.equal(run(picture, w), expected[i]) for _ in range(60))

    with ThreadPoolExecutor(len(runs)) as threads:
        assert sum(threads.map(wrong, range(len(runs)))) == 0


@torch.no_grad()
def test_no_hook_stays_behind_even_if_coding_fails() -> None:
    vae, cfw = networks({}, (1, 2))
    posterior, features = encode_with_features(vae, picture_for(vae), (1, 2))
    with pytest.raises(KeyError):
        decode_with_features(vae, cfw, posterior.mode(), {1: features[1]}, 1.0)
    assert not any(module._forward_hooks for module in vae.modules())


def test_a_config_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="channels names 1 levels, levels 2; give one width per level"):
        ControllableFeatureWrapping(channels=(16,), levels=(1, 2))


def test_an_autoencoder_of_another_class_is_refused() -> None:
    for vae in (AutoencoderTiny(), AsymmetricAutoencoderKL(norm_num_groups=8)):
        with pytest.raises(ConfigError, match=f"{type(vae).__name__} is given as vae, expected AutoencoderKL"):
            check_autoencoder(vae, None)
    check_autoencoder(torch.compile(tiny_vae()), None)


def test_a_cfw_of_another_autoencoder_is_refused() -> None:
    check_autoencoder(tiny_vae(), tiny_cfw(tiny_vae()))
    with pytest.raises(ConfigError, match=r"it fuses 24 channels at level 2, this autoencoder has widths \(8, 16\)"):
        check_autoencoder(tiny_vae(2), tiny_cfw(tiny_vae()))
