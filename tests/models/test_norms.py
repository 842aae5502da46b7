"""Group norms whose result does not depend on the layout of the picture, however large it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr_kit.models.execution import LARGE, LargeGroupNorm, to_channels_last
from tests.helpers.tiny import tiny_vae, unit_noise


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_a_large_channels_last_map_is_normalised_as_in_float64(affine: bool) -> None:
    x = (3 * unit_noise(2, 8, 1024, 1024) + 5).contiguous(memory_format=torch.channels_last)
    norm = LargeGroupNorm(4, 8, affine=affine)
    if affine:
        norm.load_state_dict({"weight": unit_noise(8), "bias": unit_noise(8, seed=1)})
    weight, bias = (p.double() for p in norm.parameters()) if affine else (None, None)
    expected = F.group_norm(x.double(), 4, weight, bias, norm.eps)
    found = norm(x)
    assert relative_error(found, expected) < 2e-7 < relative_error(nn.GroupNorm.forward(norm, x), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_other_maps_and_training_go_the_stock_way_to_the_bit() -> None:
    norm = LargeGroupNorm(4, 8)
    large = unit_noise(1, 8, 160, 160)
    assert large.shape[2] * large.shape[3] > LARGE
    last = large.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for x in (large, last.bfloat16(), unit_noise(1, 8, 128, 128).contiguous(memory_format=torch.channels_last)):
            stock = F.group_norm(x, 4, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
            assert torch.equal(copy.deepcopy(norm).to(x.dtype)(x), stock)
    assert torch.equal(norm(last), F.group_norm(last, 4, norm.weight, norm.bias, norm.eps))


@torch.no_grad()
def test_a_large_picture_is_coded_alike_in_both_layouts() -> None:
    picture = (0.3 * unit_noise(1, 3, 512, 512) + 0.4).clamp(-1, 1)
    vae = tiny_vae(2, mid_block_add_attention=False)  # attention would take the square of the size

    def moments() -> Tensor:
        return vae.encode(picture).latent_dist.parameters

    contiguous = moments()
    vae.to(memory_format=torch.channels_last)
    stock = moments()
    to_channels_last(vae)
    assert relative_error(moments(), contiguous) < 1e-6 < relative_error(stock, contiguous)


def test_the_network_keeps_its_type_keys_and_classes_where_it_is_so_already() -> None:
    vae = tiny_vae()
    keys, kind = list(vae.state_dict()), type(vae)
    to_channels_last(vae)
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    to_channels_last(vae)
    assert (list(vae.state_dict()), type(vae)) == (keys, kind)
    assert norms and all(type(norm) is LargeGroupNorm for norm in norms)
