"""What enlarges photos beside StableSR: a network of another project."""

from pathlib import Path

import pytest
import torch
from spandrel.architectures.ESRGAN import ESRGAN
from torch import Tensor

from stablesr_kit.errors import CheckpointError
from stablesr_kit.pipelines.face_parts import SpandrelUpsampler
from tests.helpers.tiny import unit_noise


@pytest.fixture
def network() -> ESRGAN:
    """Enlarges twice; sees 21 pixels to each side."""
    torch.manual_seed(0)
    return ESRGAN(num_filters=8, num_blocks=1, scale=2).eval()


@pytest.fixture
def upsampler(network: ESRGAN, tmp_path: Path) -> SpandrelUpsampler:
    torch.save(network.state_dict(), tmp_path / "esrgan.pth")
    return SpandrelUpsampler(tmp_path / "esrgan.pth")


def photos() -> Tensor:
    """Images (2, 3, 30, 600), wider than a tile."""
    return unit_noise(2, 3, 30, 600).clamp(-1, 1)


def test_a_photo_is_enlarged_as_if_by_the_network_at_once_and_brought_to_the_size_asked_for(
    network: ESRGAN, upsampler: SpandrelUpsampler
) -> None:
    with torch.no_grad():
        expected = network((photos() + 1) / 2).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(upsampler(photos()), expected, atol=1e-5, rtol=0)
    assert upsampler(photos(), 91, 1801).shape == (2, 3, 91, 1801)


def test_grey_photos_stay_grey_and_others_do_not_become_so(upsampler: SpandrelUpsampler) -> None:
    colour, grey = photos().split(1)
    enlarged = upsampler(torch.cat([colour, grey[:, :1].expand(-1, 3, -1, -1)]))
    assert torch.equal(enlarged[0], upsampler(colour)[0])
    assert torch.equal(enlarged[1], enlarged[1, :1].expand(3, -1, -1))
    assert enlarged[1].std() > 0


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no super-resolution network that spandrel knows") as raised:
        SpandrelUpsampler(tmp_path / "other.pth")
    assert "\n" not in str(raised.value)
