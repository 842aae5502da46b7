"""Paste a restored face into a picture without a seam; the rest of the picture does not change by a bit.

The face of a grey or tinted photograph is tinted first. With a parser, only skin, eyes and hair are pasted, and
background, clothes and hats are kept.
"""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.faces.geometry import TEMPLATE_SIZE_PX, Matrix, apply, covering, shown_in
from stablesr_kit.spaces import levels_to_image

MaskShape = Literal["oval", "square"]

GREEN = (0.0, 255.0, 0.0)

# Centre (x, y) and semi-axes of the oval, in sides of the aligned square: forehead to chin, ear to ear.
_OVAL_CENTRE, _OVAL_AXES = (0.5, 0.53), (0.40, 0.46)
# Width of its soft edge, in semi-axes.
_OVAL_EDGE = 0.35
# RGB, ITU-R BT.601 as rounded by the published script.
LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)


def paste_face(
    picture: NDArray[Any],
    face: NDArray[Any],
    to_picture: Matrix,
    *,
    scale: float = 1.0,
    shape: MaskShape = "oval",
    parsed: NDArray[np.float32] | None = None,
    box_colour: tuple[float, float, float] | None = None,
) -> None:
    """Blend a restored face into the picture, in place.

    picture: (H, W, 3 or more); channels beyond three (alpha) are kept. uint8 and uint16 are rounded and clipped, floats
    are not. face: (S, S, 3), in the picture's units. to_picture: from the face's pixels to the picture's.
    scale: enlargement since the face was found; the mask is eroded by that much more.
    shape: the soft mask: the whole square as published, or an oval, which leaves hair and background alone.
    parsed: mask (s, s), 0 to 1, of the parser; the smaller of both masks is used.
    box_colour: colour of the square's border, in the picture's units; None draws none.
    """
    size_px = len(face)
    corners = apply(to_picture, np.array([(-1.0, -1.0), (size_px, -1.0), (-1.0, size_px), (size_px, size_px)]))
    region = covering(corners, picture.shape[0], picture.shape[1])
    if region is None:
        return
    background = picture[region][..., :3]

    square = _eroded(_warped(np.ones((size_px, size_px), np.float32), to_picture, region), int(2 * scale))
    pasted = _warped(face, to_picture, region) * square[..., None]
    area = float(square.sum())
    mask = _softened(square, area)
    inner: list[NDArray[Any]] = [parsed] if parsed is not None else []
    inner += [oval(size_px)] if shape == "oval" else []
    for part in inner:
        resized = cv2.resize(part, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        mask = np.minimum(mask, _warped(resized, to_picture, region))

    blended = _over(background, pasted, mask)
    if box_colour is not None and area > 0:
        # 1400 / sqrt(area) in a face of 512 pixels, which is 2.7 pixels of the picture
        width = max(int(1400 / TEMPLATE_SIZE_PX * size_px / np.sqrt(area)), 1)
        border = np.ones((size_px, size_px), np.float32)
        border[width : size_px - width, width : size_px - width] = 0
        border = _warped(border, to_picture, region)
        blended = _over(blended, np.array(box_colour, np.float32), border)
    _store(blended, background)


def oval(size_px: int) -> NDArray[np.float32]:
    """Oval mask (S, S) of the face in an aligned square: 1 in the middle, falling smoothly to 0."""
    position = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    x, y = ((position - centre) / axis for centre, axis in zip(_OVAL_CENTRE, _OVAL_AXES, strict=True))
    radius = np.hypot(x[None, :], y[:, None])
    ramp = ((1 - radius) / _OVAL_EDGE).clip(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def is_grey(picture: NDArray[np.generic], threshold: float = 10.0) -> bool:
    """Whether the channels of a picture (H, W, 3) in 8-bit levels differ by a constant at most: grey, or one tint."""
    red, green, blue = (picture[..., channel].astype(np.float32) for channel in range(3))
    return bool(np.mean([(red - green).var(), (red - blue).var(), (green - blue).var()]) <= threshold)


def match_grey(face: NDArray[np.float32], aligned: NDArray[np.float32]) -> NDArray[np.float32]:
    """The luminance of a restored face (S, S, 3), with the mean and deviation of each channel of the aligned input.

    Both in 8-bit levels; the result is clipped to 0 ... 255. Pixels beyond the picture do not
    count.
    """
    grey = np.repeat((face @ LUMA)[..., None], 3, axis=2).astype(np.float64)
    shown = shown_in(aligned)
    shown |= not shown.any()
    mean, spread = _statistics(aligned[shown])
    own_mean, own_spread = _statistics(grey[shown])
    return ((grey - own_mean) / own_spread * spread + mean).clip(0, 255).astype(np.float32)


def _warped(face: NDArray[Any], to_picture: Matrix, region: tuple[slice, slice]) -> NDArray[Any]:
    """The face in a region of the picture, bilinear, zero around it.

    OpenCV rounds coordinates along a row to fractions of a pixel that depend on where the row begins. From the
    picture's first column, every region gets the values that a warp of the whole picture gives.
    """
    rows, columns = region
    to_rows = to_picture - np.array([[0.0, 0.0, 0.0], [0.0, 0.0, rows.start]])
    return cv2.warpAffine(face, to_rows, (columns.stop, rows.stop - rows.start))[:, columns]


def _eroded(mask: NDArray[Any], side: int) -> NDArray[Any]:
    """The mask shrunk; OpenCV takes an empty kernel for one of 3 x 3, and so do the references."""
    return cv2.erode(mask, np.ones((side, side), np.uint8) if side else np.ones((3, 3), np.uint8))


def _softened(square: NDArray[Any], area: float) -> NDArray[Any]:
    """The square with an edge that is soft over a tenth of its side, inwards."""
    edge = int(np.sqrt(area)) // 20
    return cv2.GaussianBlur(_eroded(square, 2 * edge), (2 * edge + 1, 2 * edge + 1), 0)


def _over(background: NDArray[Any], pasted: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    mask = mask[..., None]
    return np.where(mask > 0, mask * pasted + (1 - mask) * background.astype(np.float32), background)


def _store(blended: NDArray[np.float32], background: NDArray[Any]) -> None:
    if np.issubdtype(background.dtype, np.integer):
        blended = blended.round().clip(0, np.iinfo(background.dtype).max)
    background[...] = blended.astype(background.dtype)


def _statistics(colours: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = colours.astype(np.float64)
    return values.mean(axis=0), np.sqrt(values.var(axis=0) + 1e-5)


# Classes of the CelebAMask order that do not belong to the face: background, hat, necklace, neck, cloth.
OUTSIDE_CLASSES = (0, 14, 16, 17, 18)
_BORDER_PX = 10
_PARSED_PX = 512


class FaceParser(Protocol):
    """Labels the parts of aligned faces."""

    def parse(self, faces: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Classes (N, 512, 512) in the CelebAMask order of aligned faces (N, S, S, 3), RGB in 8-bit levels."""


class ParseNetParser:
    """ParseNet as facexlib has it, which the published CodeFormer scripts use; needs the extra `faces`.

    state_dict: of parsing_parsenet.pth.

    Raises:
        ConfigError: the extra is not installed.
        CheckpointError: the weights are of another network.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        try:
            from facexlib.parsing.parsenet import ParseNet
        except ImportError as error:
            raise ConfigError(
                f"parsing faces needs facexlib ({error}); pip install 'stablesr-kit[faces]', or leave the parser out"
            ) from error
        self._device = torch.device(device)
        self._network = ParseNet(in_size=_PARSED_PX, out_size=_PARSED_PX, parsing_ch=19).eval().to(self._device)
        try:
            self._network.load_state_dict(state_dict)
        except RuntimeError as error:
            reason = shorten(str(error).splitlines()[-1], 120)
            raise CheckpointError(f"these are no weights of ParseNet ({reason}); give parsing_parsenet.pth") from error

    @torch.no_grad()
    def parse(self, faces: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Classes (N, 512, 512) in the CelebAMask order of aligned faces (N, S, S, 3), RGB in 8-bit levels."""
        resized = np.stack([cv2.resize(face, (_PARSED_PX, _PARSED_PX)) for face in faces])
        logits = self._network(levels_to_image(resized).to(self._device))[0]
        labels: NDArray[np.uint8] = logits.argmax(1).to(torch.uint8).cpu().numpy()
        return labels


def parsed_mask(labels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Soft mask (512, 512), 0 to 1, of the face, hair included, from the labels (512, 512) of a parser."""
    mask = np.where(np.isin(labels, OUTSIDE_CLASSES), 0.0, 255.0)
    for _ in range(2):
        mask = cv2.GaussianBlur(mask, (101, 101), 11)
    mask[:_BORDER_PX] = mask[-_BORDER_PX:] = 0
    mask[:, :_BORDER_PX] = mask[:, -_BORDER_PX:] = 0
    return (mask / 255).astype(np.float32)
