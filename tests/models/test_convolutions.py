"""Convolutions and linear layers as matrix products: the same numbers, nowhere but where they pay off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr_kit.models.execution import WINOGRAD_VALUES, ProductConv2d, ProductLinear, to_channels_last
from tests.helpers.tiny import tiny_vae, unit_noise


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def convolution(channels_in: int, channels_out: int, bias: bool = True, kernel: int = 3) -> ProductConv2d:
    """As `to_channels_last` leaves it."""
    network = nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=bias))
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict({name: unit_noise(*shape) / 10 for name, shape in shapes.items()})
    to_channels_last(network)
    (one,) = network
    assert isinstance(one, ProductConv2d)
    return one


def expected_of(one: ProductConv2d, x: Tensor) -> Tensor:
    bias = None if one.bias is None else one.bias.double()
    return F.conv2d(x.double(), one.weight.double(), bias, padding=one.padding)


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "height", "width"),
    [(128, 128, 32, 32), (192, 128, 33, 47), (128, 256, 47, 34), (96, 192, 3, 400), (128, 128, 1025, 1)],
)
@torch.no_grad()
def test_wide_maps_of_every_size_are_convolved_as_in_float64(
    channels_in: int, channels_out: int, height: int, width: int
) -> None:
    one = convolution(channels_in, channels_out)
    x = unit_noise(2, channels_in, height, width).contiguous(memory_format=torch.channels_last)
    assert one.way(x) == one.winograd
    expected = expected_of(one, x)
    stock = nn.Conv2d.forward(one, x)
    found = one(x)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, expected) < 5e-7 and not torch.equal(found, stock)


@torch.no_grad()
def test_strips_of_rows_meet_without_a_seam() -> None:
    one = convolution(128, 128, bias=False)
    height = 2 * WINOGRAD_VALUES // (16 * 16 * 128) + 2 * 7
    x = unit_noise(1, 128, height, 32)
    assert one.way(x) == one.winograd
    assert error(one(x), expected_of(one, x)) < 5e-7


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_positions_of_many_channels_are_one_product(bias: bool) -> None:
    one = convolution(576, 960, bias)
    x = unit_noise(2, 576, 9, 13)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        assert one.way(given) == one.unfolded
        found = one(given)
        assert error(found, expected_of(one, x)) < 1e-6
        assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_1_x_1_convolutions_and_linear_layers_are_one_product() -> None:
    one = convolution(48, 96, kernel=1)
    x = unit_noise(2, 48, 33, 15)
    assert one.way(x) == one.pointwise
    assert error(one(x), expected_of(one, x)) < 5e-7
    linear = ProductLinear(48, 96)
    rows = unit_noise(2, 3, 200, 48)
    assert error(linear(rows), F.linear(rows.double(), linear.weight.double(), linear.bias.double())) < 5e-7


def test_what_does_not_pay_off_and_training_go_the_stock_way_to_the_bit() -> None:
    one = convolution(128, 128)
    large, small = unit_noise(1, 128, 40, 40), unit_noise(1, 128, 16, 16)
    with torch.no_grad():
        assert torch.equal(one(small), F.conv2d(small, one.weight, one.bias, padding=1))
        narrow = convolution(256, 32)
        x = unit_noise(1, 256, 40, 40)
        assert torch.equal(narrow(x), F.conv2d(x, narrow.weight, narrow.bias, padding=1))
        halved = convolution(128, 128).bfloat16()
        x = large.bfloat16()
        assert torch.equal(halved(x), F.conv2d(x, halved.weight, halved.bias, padding=1))
    assert torch.equal(one(large), F.conv2d(large, one.weight, one.bias, padding=1))
    linear, rows = ProductLinear(64, 64), unit_noise(1000, 64)
    for layer, x in ((one, large), (linear, rows)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer(x).sum().backward()
        assert layer.weight.grad is not None


def test_the_network_keeps_its_keys_and_its_other_convolutions() -> None:
    vae = tiny_vae()
    before = {name: type(module) for name, module in vae.named_modules()}
    keys = list(vae.state_dict())
    to_channels_last(vae)
    assert list(vae.state_dict()) == keys
    for name, module in vae.named_modules():
        if before[name] is nn.Conv2d:
            assert type(module) is (ProductConv2d if module.stride == (1, 1) else nn.Conv2d), name
        if before[name] is nn.Linear:
            assert type(module) is ProductLinear, name
