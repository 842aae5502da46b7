"""CFW beside a stock autoencoder: nothing at w = 0, the formula elsewhere, and hooks that fire."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, UserCpuOffloadHook, add_hook_to_module
from diffusers import AutoencoderKL
from torch import Tensor

from stablesr_kit import ControllableFeatureWrapping
from stablesr_kit.models.feature_wrapping import decode_with_features, encode_with_features
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


def test_a_config_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="channels names 1 levels, levels 2; give one width per level"):
        ControllableFeatureWrapping(channels=(16,), levels=(1, 2))
