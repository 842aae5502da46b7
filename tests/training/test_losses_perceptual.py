"""Perceptual losses against torchvision and lpips with the same weights, and what happens where weights are missing."""

import logging
from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from stablesr_kit.errors import CheckpointError
from stablesr_kit.training.data.batches import SampleDraws
from stablesr_kit.training.losses.perceptual import (
    LPIPS,
    FeatureReconstruction,
    PerceptualOptions,
    load_perceptual_loss,
    read_vgg16,
    shifted,
)
from tests.helpers.vgg_files import random_vgg16, save_vgg16


@pytest.fixture(scope="module")
def vgg16() -> nn.Sequential:
    return random_vgg16()


@pytest.fixture(scope="module")
def weights(vgg16: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vgg16(vgg16, tmp_path_factory.mktemp("vgg"))


def pictures(seed: int, side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def imagenet(image: Tensor) -> Tensor:
    return torchvision.transforms.functional.normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_feature_reconstruction_is_the_squared_distance_over_c_h_w(vgg16: nn.Sequential, weights: Path) -> None:
    loss = FeatureReconstruction(read_vgg16(weights).state, layers=(3, 8, 15))
    image, target = pictures(0), pictures(1)
    expected = torch.zeros(())
    for layer in (3, 8, 15):
        ours, theirs = (vgg16[: layer + 1](imagenet(picture)) for picture in (image, target))
        _, channels, height, width = ours.shape
        expected += ((ours - theirs).flatten(1).norm(dim=1) ** 2 / (channels * height * width)).mean()
    torch.testing.assert_close(loss(image, target), expected, rtol=1e-4, atol=0)
    assert loss(image, image) == 0


def test_feature_reconstruction_reaches_the_picture_and_neither_target_nor_network(weights: Path) -> None:
    loss = FeatureReconstruction(read_vgg16(weights).state)
    image, target = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    loss(image, target).backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_lpips_is_that_of_the_lpips_package(vgg16: nn.Sequential, weights: Path) -> None:
    peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for part, (first, last) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)]):
        for number in range(first, last):
            getattr(peer.net, f"slice{part + 1}")[number - first].load_state_dict(vgg16[number].state_dict())
    image, target = pictures(0), pictures(1)
    ours = LPIPS(read_vgg16(weights).state)
    with torch.no_grad():
        torch.testing.assert_close(ours(image, target), peer(image, target).mean())
        twice = LPIPS(read_vgg16(weights).state, official_quirks=True)(image, target)
        torch.testing.assert_close(twice, peer(imagenet(image), imagenet(target)).mean())
        assert not torch.allclose(twice, ours(image, target), rtol=1e-2)
    assert ours(image, image) == 0
    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", map_location="cpu", weights_only=True
    )
    assert torch.equal(ours.network.lin4.model[1].weight, heads["lin4.model.1.weight"])


@pytest.mark.parametrize(("kind", "expected"), [("vgg", FeatureReconstruction), ("lpips", LPIPS)])
def test_the_options_choose_the_loss_and_the_log_names_its_weights(
    kind: str, expected: type, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loss = load_perceptual_loss(PerceptualOptions(perceptual=kind, perceptual_weights=str(weights)))
    assert isinstance(loss, expected)
    assert f"perceptual loss {kind} on the VGG-16 of {weights}" in caplog.text


def test_shifted_pictures_are_the_same_part_of_both_and_another_for_every_sample() -> None:
    image = torch.arange(4 * 3 * 20 * 24).float().view(4, 3, 20, 24)
    draws = SampleDraws(0, torch.arange(4), 4)
    ours, other = shifted((image, image + 0.5), draws, 8)
    assert ours.shape == (4, 3, 12, 16)
    torch.testing.assert_close(other, ours + 0.5)
    for sample, part in zip(image, ours, strict=True):
        views = [sample[:, top : top + 12, left : left + 16] for top in range(9) for left in range(9)]
        flips = [view.flip(axes) for view in views for axes in ((), (-2,), (-1,), (-2, -1))]
        assert sum(torch.equal(part, view) for view in flips) == 1
    again, _ = shifted((image, image), SampleDraws(0, torch.arange(4), 4), 8)
    assert torch.equal(again, ours)
    first = [part.amin() - sample.amin() for part, sample in zip(ours, image, strict=True)]
    assert len({float(value) for value in first}) > 1


def test_a_run_without_perceptual_loss_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load_perceptual_loss(PerceptualOptions()) is None
    assert "trains without a perceptual loss" in caplog.text


def test_weights_that_cannot_be_had_are_an_error_and_never_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match=r"vgg16-397923af\.pth and cannot be fetched .*perceptual none"):
        load_perceptual_loss(PerceptualOptions(perceptual="lpips"))


def test_weights_are_taken_from_the_cache_of_torchvision(
    vgg16: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    torch.save({f"features.{name}": tensor for name, tensor in vgg16.state_dict().items()}, cached)
    found = read_vgg16(None)
    assert found.origin == str(cached)
    assert torch.equal(found.state["28.weight"], vgg16[28].weight)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"is no VGG-16 of torchvision: features\.0\.bias is missing"):
        read_vgg16(tmp_path / "other.safetensors")
