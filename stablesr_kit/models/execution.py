"""How stock networks run safely: precision, norms of large pictures, and weights that lie on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stablesr_kit.errors import ConfigError


def change_class(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Give the module a subclass of its class, whose forward is also what hooks put on before call. Raises ConfigError.

    accelerate and diffusers put their hooks around the forward they find, keep that one, and leave it on the module
    when the hooks are taken off.
    """
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", [])
    kept = [
        (holder, key)
        for holder in (vars(module), *(vars(reference) for reference in references))
        for key in ("forward", "_old_forward", "original_forward")
        if getattr(holder.get(key), "__func__", None) is type(module).forward
    ]
    if "forward" in vars(module) and not kept:
        raise ConfigError(f"{name} has a forward of its own, which is not that of its class; remove it first")
    module.__class__ = kind
    for holder, key in kept:
        holder[key] = MethodType(kind.forward, module)


LARGE = 128 * 128
"""Positions above which torch's own sums lose digits that matter."""
CHUNK = 2**16
"""Values that are summed at once; they stay in a core's cache."""


class LargeGroupNorm(nn.GroupNorm):
    """The stock group norm, with statistics that do not lose digits with the size of the picture.

    On the CPU torch sums channels-last maps in float32 from the first position to the last: the relative error of the
    result is 4e-5 at 512 x 512 positions and 3e-4 at 1024 x 1024, contiguous maps keep it at 1e-7 but convolutions on
    them are slower. Here sums are taken chunk by chunk, as deviations from a value of the channel, and added in
    float64. Other devices, layouts and sizes, and training, go the stock way.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised values of (B, C, h, w)."""
        if (
            input.ndim != 4
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or torch.is_grad_enabled()
            or input.shape[2] * input.shape[3] <= LARGE
            or not input.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(input)
        batch, channels, height, width = input.shape
        count = height * width
        positions = input.permute(0, 2, 3, 1).view(batch, count, channels)
        first = positions[:, :1].clone()
        sums = torch.zeros(2, batch, channels, dtype=torch.float64)
        for chunk in positions.split(max(1, CHUNK // channels), dim=1):
            deviations = chunk - first
            sums[0] += deviations.sum(1)
            sums[1] += deviations.square_().sum(1)
        mean, square = sums / count
        variance = square - mean**2
        mean = (mean + first[:, 0]).view(batch, self.num_groups, -1)
        group_mean = mean.mean(2, keepdim=True)
        group_variance = (variance.view_as(mean) + (mean - group_mean) ** 2).mean(2, keepdim=True)
        scale = (group_variance + self.eps).rsqrt().expand_as(mean)
        shift = -group_mean * scale
        if self.affine:
            weight = self.weight.double().view(1, self.num_groups, -1)
            scale, shift = scale * weight, shift * weight + self.bias.double().view_as(weight)
        scale, shift = (value.float().reshape(batch, channels, 1, 1) for value in (scale, shift))
        return torch.addcmul(shift, input, scale)


def to_channels_last(network: nn.Module) -> None:
    """Weights in the layout in which convolutions on the CPU are a fifth faster, with norms that stand it."""
    network.to(memory_format=torch.channels_last)
    use_large_group_norms(network)


def use_large_group_norms(network: nn.Module) -> None:
    """Let the norms of a network stand channels-last pictures of any size; the network stays what it was otherwise."""
    for name, module in network.named_modules():
        if type(module) is nn.GroupNorm:
            change_class(module, LargeGroupNorm, name)


_users: "WeakKeyDictionary[nn.Module, tuple[int, torch.dtype]]" = WeakKeyDictionary()
_counting = Lock()


@contextmanager
def in_float32(*networks: nn.Module) -> Iterator[None]:
    """Networks that work together, all in float32 meanwhile if one of them is in float16, which ends at 65504.

    Threads may share a network: the last of them to leave casts it back.
    """
    with _counting:
        dtypes = {one: next((p.dtype for p in one.parameters()), torch.float32) for one in networks}
        overflows = any(one in _users or dtype == torch.float16 for one, dtype in dtypes.items())
        entered = dtypes if overflows else {}
        for network, dtype in entered.items():
            users, before = _users.get(network, (0, dtype))
            _users[network] = users + 1, before
            network.float()
    try:
        yield
    finally:
        with _counting:
            for network in entered:
                users, before = _users.pop(network)
                if users > 1:
                    _users[network] = users - 1, before
                else:
                    nn.Module.to(network, before)  # that of diffusers warns of every cast


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


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16.

    Others compute it through float32, several times slower than float32 itself.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public name for either
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False
