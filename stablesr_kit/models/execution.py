"""How stock networks run safely and fast: precision, norms, convolutions on the CPU, weights that lie on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

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
        return large_group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def large_group_norm(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.group_norm` of channels-last values (B, C, h, w), see `LargeGroupNorm`.

    A `TorchFunctionMode` sees it as it sees torch's own functions: tiles are normalised by given statistics.
    """
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(large_group_norm, (input,), input, num_groups, weight, bias, eps)
        return result
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
    mean = (mean + first[:, 0]).view(batch, num_groups, -1)
    group_mean = mean.mean(2, keepdim=True)
    group_variance = (variance.view_as(mean) + (mean - group_mean) ** 2).mean(2, keepdim=True)
    scale = (group_variance + eps).rsqrt().expand_as(mean)
    shift = -group_mean * scale
    if weight is not None and bias is not None:
        factor = weight.double().view(1, num_groups, -1)
        scale, shift = scale * factor, shift * factor + bias.double().view_as(factor)
    scale, shift = (value.float().reshape(batch, channels, 1, 1) for value in (scale, shift))
    return torch.addcmul(shift, input, scale)


def is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether a layer may be computed in our own way: float32 on the CPU, and nobody asks how it is computed.

    Gradients, autocast, compilation, quantised weights and tensors of other libraries go the stock way.
    """
    return (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and type(input) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN: values (..., out) of (..., in), weights (out, in), all float32 on the CPU.

    torch takes MKL for float32, which leaves out the AVX-512 of processors that are not Intel's: there it takes 2.3
    times as long. With AVX2 both take about the same time.
    """
    # what torch.compile makes of a linear layer on the CPU; torch has no public name for it
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found


LEAST_PRODUCT = 2**20
"""Multiplications below which a layer takes no time that matters, and goes the stock way."""
WINOGRAD_VALUES = 2**22
"""Transformed values of a strip of rows: large enough for full matrix products, small enough for the cache."""


class ProductLinear(nn.Linear):
    """The stock linear layer, by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """Values (..., out_features) of (..., in_features)."""
        if input.numel() * self.out_features >= LEAST_PRODUCT and is_plain(input, self.weight):
            return product(input, self.weight, self.bias)
        return super().forward(input)


class ProductConv2d(nn.Conv2d):
    """The stock convolution with stride 1 and a kernel of 1 x 1 or 3 x 3, as matrix products where that pays off.

    1 x 1: one product. 3 x 3 with more weights than values, as in the middle of a UNet: one product of unfolded
    neighbourhoods, a quarter to three fifths of oneDNN's own time, which is spent on weights. 3 x 3 on wide and large
    maps: F(2 x 2, 3 x 3) of Lavin and Gray 2016, which makes 2 x 2 results of 4 x 4 inputs with 16 multiplications
    instead of 36, as sixteen products of a strip of rows; three fifths of oneDNN's time at 512 channels, and less
    rounding: sums have a ninth of the terms. All else, and training, goes the stock way.
    """

    def way(self, input: Tensor) -> Callable[[Tensor], Tensor]:
        """How these values (B, in_channels, h, w) are convolved: by one of the methods below or the stock forward."""
        if input.ndim == 4 and is_plain(input, self.weight):
            positions = input.shape[2] * input.shape[3]
            if self.kernel_size == (1, 1):
                if input.numel() * self.out_channels >= LEAST_PRODUCT:
                    return self.pointwise
            elif self.in_channels * self.out_channels >= 2**19 and 4 * len(input) * positions <= self.out_channels:
                return self.unfolded
            elif self.in_channels * self.out_channels >= 64 * (self.in_channels + self.out_channels):
                if positions >= 1024:  # enough to pay for the transform of weights
                    return self.winograd
        return super().forward

    def forward(self, input: Tensor) -> Tensor:
        """Convolved values (B, C, h, w) of (B, in_channels, h, w)."""
        return self.way(input)(input)

    def pointwise(self, input: Tensor) -> Tensor:
        """1 x 1, as one product."""
        x = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return product(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def unfolded(self, input: Tensor) -> Tensor:
        """3 x 3, as one product of all neighbourhoods."""
        padded = nn.functional.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, h, w, 9 C)
        return product(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)

    def winograd(self, input: Tensor) -> Tensor:
        """3 x 3, by F(2 x 2, 3 x 3)."""
        batch, _, height, width = input.shape
        channels_in, channels_out = self.in_channels, self.out_channels
        x = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        rows, columns = (height + 1) // 2, (width + 1) // 2  # of 2 x 2 results; an odd last one is cut off
        y = x.new_empty(batch, 2 * rows, 2 * columns, channels_out)
        weight = self.weight.permute(2, 3, 0, 1).reshape(9, channels_out * channels_in)
        weight = torch.matmul(torch.kron(_WINOGRAD, _WINOGRAD), weight).view(16, channels_out, channels_in)
        strip = min(rows, max(1, WINOGRAD_VALUES // (16 * columns * max(channels_in, channels_out))))
        by_rows = x.new_zeros(4, strip, 2 * columns + 2, channels_in)  # the outer columns are padding and stay 0
        transformed = x.new_empty(16 * strip * columns * channels_in)
        for picture, result in zip(x, y, strict=True):
            for start in range(0, rows, strip):
                count = min(strip, rows - start)
                top, bottom = 2 * start - 1, 2 * (start + count) + 1
                part = picture[max(top, 0) : min(bottom, height)]
                if top < 0 or bottom > height:
                    part = nn.functional.pad(part, (0, 0, 0, 0, max(-top, 0), max(bottom - height, 0)))
                t = by_rows[:, :count]
                _into_differences([part[i : i + 2 * count - 1 : 2] for i in range(4)], t[:, :, 1 : width + 1])
                v = transformed[: 16 * count * columns * channels_in].view(4, 4, count, columns, channels_in)
                _into_differences([t[:, :, i : i + 2 * columns - 1 : 2] for i in range(4)], v.transpose(0, 1))
                m = [  # the bias goes through the sixth alone once into each result
                    product(one, by, self.bias if i == 5 else None)
                    for i, (one, by) in enumerate(zip(v.flatten(0, 1), weight, strict=True))
                ]
                upper, lower = [], []
                for m0, m1, m2, m3 in zip(m[:4], m[4:8], m[8:12], m[12:], strict=True):
                    upper.append(m0.add_(m1).add_(m2))
                    lower.append(m1.sub_(m2).sub_(m3))
                for row, sums in enumerate((upper, lower)):
                    into = result[2 * start + row : 2 * (start + count) : 2]
                    torch.add(sums[0].add_(sums[1]), sums[2], out=into[:, 0::2])
                    torch.sub(sums[1].sub_(sums[2]), sums[3], out=into[:, 1::2])
        found = y[:, :height, :width].permute(0, 3, 1, 2)
        return found.contiguous(memory_format=torch.channels_last)


_WINOGRAD = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], device="cpu")
"""G of Lavin and Gray 2016, for weights."""


def _into_differences(d: Sequence[Tensor], out: Tensor) -> None:
    """Their B^T, for inputs, along one side: four values into the four of `out`."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def to_channels_last(network: nn.Module) -> None:
    """Weights in the layout in which convolutions on the CPU are a fifth faster, with norms that stand it.

    Convolutions and linear layers become those of this module; the network stays what it was otherwise.
    """
    network.to(memory_format=torch.channels_last)
    use_large_group_norms(network)
    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            change_class(module, ProductLinear, name)
        elif type(module) is nn.Conv2d and (
            (module.stride, module.dilation, module.groups, module.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
            and (module.kernel_size, module.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        ):
            change_class(module, ProductConv2d, name)


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


def offload_groups_to_disk(
    components: Mapping[str, Any],
    folder: str | Path,
    onload_device: torch.device,
    *args: Any,
    exclude_modules: str | Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Group offloading of diffusers for several networks that share a folder.

    diffusers names a file by its layers, and reuses an existing file of that name: layers of equal names in two
    networks, or of another run, would be mixed up silently. Here every network gets its own folder in the given one,
    removed with the network. Weights become contiguous, since others cannot be written.

    components: by name; those that are no networks are left out. exclude_modules: names of networks that go to the
    device whole. args, options: of `ModelMixin.enable_group_offload`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
    for name, network in components.items():
        if not isinstance(network, nn.Module):
            continue
        if name in excluded:
            network.to(onload_device)
            continue
        own = tempfile.mkdtemp(prefix=f"{name}-", dir=folder)
        weakref.finalize(network, shutil.rmtree, own, ignore_errors=True)
        network.to(memory_format=torch.contiguous_format)
        if isinstance(network, ModelMixin):
            network.enable_group_offload(onload_device, *args, offload_to_disk_path=own, **options)
        else:  # of transformers
            apply_group_offloading(network, onload_device, *args, offload_to_disk_path=own, **options)


def execution_device(network: nn.Module) -> torch.device:
    """The device on which the network computes, also if it is offloaded."""
    for module in network.modules():
        group = _group_hook(module)
        if group is not None:
            return torch.device(group.config.onload_device)
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # accelerate chains them
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(network.parameters()).device


@contextmanager
def in_use(network: nn.Module) -> Iterator[None]:
    """Context that loads an offloaded network as a call of it would, for calling its layers one by one.

    Groups of blocks are all on the device during it; layers offloaded one by one have their own hooks.
    """
    _bring_to_device(network)
    hooks = [hook for module in network.modules() if (hook := _group_hook(module)) is not None]
    groups = {id(hook.group): hook.group for hook in hooks if hook.config.offload_type == "block_level"}
    for group in groups.values():
        group.onload_()
    try:
        yield
    finally:
        for group in groups.values():
            group.offload_()


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


@apply_forward_hook
def _bring_to_device(_network: nn.Module) -> None:
    """Let the hook of an offloaded network bring it to its device, as a call of it would."""


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16.

    Others compute it through float32, several times slower than float32 itself.
    """
    # AVX512-BF16 without AMX, measured, of the time in float32: a step of full size 0.75, encoding 0.42, decoding 0.56,
    # mini 0.59, its training 0.75; with AVX2 alone a convolution takes 4.7 times as long
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public name for either
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False
