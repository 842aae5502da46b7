"""Losses of finding a codebook's codes from a damaged picture (Zhou et al. 2022, eq. 2 and 3).

The loss that makes the codebook itself is `NearestQuantizer`'s.
"""

import torch.nn.functional as F
from torch import Tensor


def commitment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean squared distance |z - sg(codes)|^2 of features and codes (B, C, h, w), which moves only the features.

    z are features of the damaged picture, codes the codebook's entries that stand for the good one.
    """
    return F.mse_loss(z, codes.detach())


def code_token_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy of the codes' numbers, indices (B, tokens), under logits (B, tokens, codebook size)."""
    return F.cross_entropy(logits.float().transpose(1, 2), indices)
