"""The tiled autoencoder and CFW under every kind of offloading: large pictures and small memory come together."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from torch import Tensor, nn

from stablesr_kit.models.execution import execution_device
from stablesr_kit.tiling.autoencoder import TiledAutoencoder
from tests.helpers.tiny import tiny_cfw, tiny_vae, unit_noise

CPU = torch.device("cpu")
IMAGE = unit_noise(1, 3, 40, 44).clamp(-1, 1)


def coded(vae: Any, cfw: Any) -> tuple[Tensor, Tensor]:
    """Moments and the picture decoded from them."""
    tiled = TiledAutoencoder(vae, cfw, tile_px=24)
    moments, features = tiled.encode_with_features(IMAGE, tuple(cfw.config.levels))
    return moments.to_tensor(), tiled.decode(moments.to_tensor()[:, :4], features, 0.5).to_tensor()


def offload(network: nn.Module, kind: str, folder: Path) -> None:
    if kind == "sequential":
        accelerate.cpu_offload(network, CPU)
        assert next(network.parameters()).device == torch.device("meta")
    elif kind == "model":
        add_hook_to_module(network, CpuOffload(execution_device=CPU))
    else:
        level, _, place = kind.partition(" to ")
        options: dict[str, Any] = {"offload_type": f"{level}_level"}
        options |= {"num_blocks_per_group": 1} if level == "block" else {}
        options |= {"offload_to_disk_path": str(folder / type(network).__name__)} if place else {}
        network.enable_group_offload(CPU, CPU, **options)


@pytest.mark.parametrize("kind", ["sequential", "model", "leaf", "block", "leaf to disk", "block to disk"])
def test_tiles_are_coded_to_the_same_bits_whatever_offloads_the_networks(kind: str, tmp_path: Path) -> None:
    vae = tiny_vae(mid_block_add_attention=True)
    expected = coded(vae, tiny_cfw(vae))
    offloaded = tiny_vae(mid_block_add_attention=True)
    cfw = tiny_cfw(offloaded)
    for network in (offloaded, cfw):
        offload(network, kind, tmp_path)
    assert execution_device(offloaded) == execution_device(cfw) == CPU
    for _ in range(2):  # it is set up for the next picture
        assert all(torch.equal(*pair) for pair in zip(coded(offloaded, cfw), expected, strict=True))


def test_the_device_of_an_offloaded_network_is_the_one_it_computes_on() -> None:
    for kind in ("sequential", "model"):
        network = nn.Sequential(nn.Linear(2, 2))
        if kind == "model":
            add_hook_to_module(network, CpuOffload(execution_device=torch.device("cuda:1")))
        else:
            accelerate.cpu_offload(network, torch.device("cuda:1"))
        assert execution_device(network) == torch.device("cuda:1")
