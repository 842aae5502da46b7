"""Group norms that keep their digits in channels-last pictures of any size."""

import torch
from torch import Tensor, nn

from stablesr_kit.models.classes import change_class

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
