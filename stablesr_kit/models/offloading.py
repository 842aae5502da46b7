"""Networks of one pipeline whose weights lie on disk until they are needed."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


def offload_groups_to_disk(networks: Mapping[str, nn.Module], folder: str | Path, *args: Any, **options: Any) -> None:
    """Group offloading of diffusers for several networks that share a folder.

    diffusers names a file by the layers in it, and takes one that is there for its own: layers of equal names in two
    networks, or of another run, would be mixed up without a word. Here every network gets a folder of its own in the
    given one, removed with the network. Weights become contiguous, since no others can be written.

    args, options: of `ModelMixin.enable_group_offload`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        own = tempfile.mkdtemp(prefix=f"{name}-", dir=folder)
        weakref.finalize(network, shutil.rmtree, own, ignore_errors=True)
        network.to(memory_format=torch.contiguous_format)
        if isinstance(network, ModelMixin):
            network.enable_group_offload(*args, offload_to_disk_path=own, **options)
        else:  # of transformers
            apply_group_offloading(network, *args, offload_to_disk_path=own, **options)
