"""Where in an aligned face the skin, eyes and hair are, so that background, clothes and hats are left alone."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.errors import CheckpointError, ConfigError
from stablesr_kit.spaces import levels_to_image

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
