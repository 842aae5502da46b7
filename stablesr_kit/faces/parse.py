"""Where in an aligned face the skin, eyes and hair are, so that background, clothes and hats are left alone."""

from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

# Classes of the CelebAMask order that do not belong to the face: background, hat, necklace, neck, cloth.
OUTSIDE_CLASSES = (0, 14, 16, 17, 18)
_BORDER_PX = 10


class FaceParser(Protocol):
    """Labels the parts of aligned faces."""

    name: str
    """What a report calls it."""

    def parse(self, faces: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Classes (N, 512, 512) in the CelebAMask order of aligned faces (N, S, S, 3), RGB in 8-bit levels."""


def parsed_mask(labels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Soft mask (512, 512), 0 to 1, of the face, hair included, from the labels (512, 512) of a parser."""
    mask = np.where(np.isin(labels, OUTSIDE_CLASSES), 0.0, 255.0)
    for _ in range(2):
        mask = cv2.GaussianBlur(mask, (101, 101), 11)
    mask[:_BORDER_PX] = mask[-_BORDER_PX:] = 0
    mask[:, :_BORDER_PX] = mask[:, -_BORDER_PX:] = 0
    return (mask / 255).astype(np.float32)
