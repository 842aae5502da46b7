"""What moves from one frame of a clip to the next: optical flow, where it can be trusted, and scene cuts.

A flow (2, H, W), float32, across and down in pixels, lives on the grid of one picture: its pixel p is seen at p + flow
in the other. What is warped backward with it is sampled there, so the result lies on the flow's own grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.errors import CheckpointError, ConfigError, reason_of
from stablesr_kit.imaging.color_fix import LUMA

FlowEstimator = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float32]]
"""Grey pictures (H, W) -> the flow (H, W, 2) of the first to the second."""

FLOW_SIDE = 256
"""Pictures are enlarged until their shorter side has as many pixels: flow in smaller ones is coarse."""
LEAST_VALID = 0.4
"""Of a frame: with less that can be followed to the frame before, there is a cut."""
MOST_CHANGE = 0.5
"""Of the grey histograms of two frames: above it there is a cut."""


@dataclass(frozen=True)
class Motion:
    """From the frame before to this one.

    back: flow of this frame to the one before, forth: the other way round; both (2, H, W). valid: (H, W), 1 where
    the two agree, 0 where this frame shows what the one before does not.
    """

    back: Tensor
    forth: Tensor
    valid: Tensor

    @property
    def is_cut(self) -> bool:
        """Whether too little of the frame before is left."""
        return bool(self.valid.mean() < LEAST_VALID)

    def at(self, height: int, width: int) -> "Motion":
        """The same for pictures of another size."""
        valid = resized_map(self.valid[None], height, width)[0]
        return Motion(resized_flow(self.back, height, width), resized_flow(self.forth, height, width), valid)

    def on_canvas(self, height: int, width: int, margin: int) -> "Motion":
        """The same for canvases that begin `margin` pixels above and to the left; nothing is valid outside."""
        bottom, right = (side - margin - own for side, own in zip((height, width), self.valid.shape, strict=True))
        edges = (margin, right, margin, bottom)
        back, forth = (F.pad(flow[None], edges, mode="replicate")[0] for flow in (self.back, self.forth))
        return Motion(back, forth, F.pad(self.valid, edges))


def motion_between(before: Tensor, now: Tensor, estimate: FlowEstimator) -> Motion | None:
    """The motion from one picture (3, h, w) in [-1, 1] to the next, or None at a scene cut.

    A flow counts where going there and back ends within a pixel or so (Sundaram et al. 2010, eq. 5) and inside.
    """
    _, height, width = now.shape
    factor = max(FLOW_SIDE / min(height, width), 1)
    size = round(height * factor), round(width * factor)
    earlier, later = (_grey(picture, *size) for picture in (before, now))
    if _change(earlier, later) > MOST_CHANGE:
        return None
    back = torch.from_numpy(estimate(later, earlier)).permute(2, 0, 1).contiguous()
    forth = torch.from_numpy(estimate(earlier, later)).permute(2, 0, 1).contiguous()
    motion = Motion(back, forth, agreement(back, forth))
    return None if motion.is_cut else motion.at(height, width)


def agreement(flow: Tensor, other: Tensor) -> Tensor:
    """1 where a flow and that of the other way agree, (H, W) on the grid of the first (Sundaram et al. 2010, eq. 5)."""
    returned = warped(other, flow)
    error = (flow + returned).square().sum(0)
    allowed = 0.01 * (flow.square().sum(0) + returned.square().sum(0)) + 0.5
    return ((error < allowed) & _is_inside(flow)).float()


def warped(picture: Tensor, flow: Tensor, mode: Literal["bilinear", "bicubic", "nearest"] = "bilinear") -> Tensor:
    """The picture (C, H, W) sampled where the flow of another one points; edges are repeated."""
    _, height, width = flow.shape
    x, y = _targets(flow)
    if mode == "nearest":
        columns, rows = (values.round().long() for values in (x, y))
        return picture[:, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    grid = torch.stack([x * 2 / max(width - 1, 1) - 1, y * 2 / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(picture[None], grid[None].to(picture), mode, "border", align_corners=True)[0]


def resized_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """The flow between pictures of another size: its arrows grow with them."""
    _, given_height, given_width = flow.shape
    factors = flow.new_tensor([width / given_width, height / given_height])
    return resized_map(flow, height, width) * factors[:, None, None]


def resized_map(values: Tensor, height: int, width: int) -> Tensor:
    """A map (C, h, w) at another size: a mean where it shrinks, bilinear where it grows."""
    if (height, width) == tuple(values.shape[1:]):
        return values
    shrinks = height < values.shape[1] or width < values.shape[2]
    return F.interpolate(values[None], (height, width), mode="bilinear", antialias=shrinks)[0]


def warping_error(now: Tensor, before: Tensor, motion: Motion) -> float | None:
    """How unsteady two restored frames (3, H, W) in [-1, 1] are: their mean squared difference along the motion.

    Of values in [0, 1], over what both frames show (Lai et al. 2018, eq. 9): where the flows agree, and away from the
    boundaries of what moves. Papers print it times 1000. None if that is nowhere.
    """
    counted = motion.valid * is_smooth(motion.back)
    weight = counted.sum() * len(now)
    difference = (now - warped(before, motion.back)) / 2
    return float((difference.square() * counted).sum() / weight) if weight > 0 else None


def is_smooth(flow: Tensor) -> Tensor:
    """1 where a flow changes little from pixel to pixel, 0 at motion boundaries, (H, W); at least 2 by 2.

    Sundaram et al. 2010, eq. 6.
    """
    change = sum(part.square() for component in flow for part in torch.gradient(component))
    return (change <= 0.01 * flow.square().sum(0) + 0.002).float()


def dis_flow() -> FlowEstimator:
    """Dense inverse search (Kroeger et al. 2016) as OpenCV has it: no weights, the same to the bit on one machine."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def estimate(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(search.calc(one, other, None), np.float32)  # type: ignore[call-overload]

    return estimate


def raft_flow(weights: Path, device: torch.device) -> FlowEstimator:
    """RAFT (Teed and Deng 2020) of torchvision, small or large, from a file of its weights.

    Raises:
        CheckpointError: the file is not one of them.
        ConfigError: torchvision is not installed.
    """
    try:
        from torchvision.models import optical_flow
    except ImportError as error:
        raise ConfigError("RAFT needs torchvision; install it, or take the flow of OpenCV (dis)") from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        is_small = state["feature_encoder.convnormrelu.0.weight"].shape[0] == 32
        make = optical_flow.raft_small if is_small else optical_flow.raft_large
        network = make(weights=None, progress=False)
        network.load_state_dict(state)
    except Exception as error:  # of damaged files every kind
        raise CheckpointError(
            f"{weights}: not the weights of torchvision's raft_small or raft_large ({reason_of(error)}); "
            "give such a file, or dis"
        ) from error
    network = network.eval().to(device)

    @torch.no_grad()
    def estimate(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float32]:
        height, width = one.shape
        padding = (0, max(-width % 8, 128 - width), 0, max(-height % 8, 128 - height))
        pictures = torch.from_numpy(np.stack([one, other]))[:, None].float() / 127.5 - 1
        pair = F.pad(pictures, padding, mode="replicate").expand(-1, 3, -1, -1).to(device)
        flow = network(pair[:1].contiguous(), pair[1:].contiguous())[-1][0, :, :height, :width]
        return np.ascontiguousarray(flow.permute(1, 2, 0).cpu().numpy())

    return estimate


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    _, height, width = flow.shape
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[1]
    return x, y


def _is_inside(flow: Tensor) -> Tensor:
    _, height, width = flow.shape
    x, y = _targets(flow)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _grey(picture: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """Luma (height, width) of a picture (3, h, w) in [-1, 1]; blurred a little, since noise has no motion."""
    luma = torch.einsum("chw,c->hw", picture.float().cpu(), torch.tensor(LUMA))[None, None]
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    smooth = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), torch.outer(kernel, kernel)[None, None])
    large = F.interpolate(smooth, (height, width), mode="bicubic") if (height, width) != luma.shape[2:] else smooth
    return ((large[0, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def _change(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Half the difference of two pictures' histograms of 16 levels: 0 the same, 1 nothing in common."""
    shares = [np.bincount(picture.ravel() // 16, minlength=16) / picture.size for picture in (one, other)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
