"""The kinds of offloading that move parts of a network, from the CPU to the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch

OFFLOADS: dict[str, Callable[[Any, Path], object]] = {
    "sequential": lambda network, _: accelerate.cpu_offload(network, torch.device("cpu")),
    "block_level": lambda network, _: network.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "leaf_level": lambda network, _: network.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "block_level to disk": lambda network, folder: network.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaf_level to disk": lambda network, folder: network.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}
