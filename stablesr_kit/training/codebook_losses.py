"""Losses of a codebook (van den Oord et al. 2017) and of finding its codes from a damaged picture (Zhou et al. 2022).

z are features of an encoder and codes the codebook's entries that stand for them, both (B, C, h, w).
"""

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean squared distance that moves only the codes, towards the features that chose them: |sg(z) - codes|^2."""
    return F.mse_loss(codes, z.detach())


def commitment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean squared distance that moves only the features, towards their codes: |z - sg(codes)|^2.

    Also the code-level feature loss of CodeFormer's stages II and III, where z are features of the damaged picture and
    codes those of the good one.
    """
    return F.mse_loss(z, codes.detach())


def codebook_loss(z: Tensor, codes: Tensor, *, beta: float = 0.25, beta_on_alignment: bool = False) -> Tensor:
    """alignment + beta * commitment, as van den Oord et al. 2017 (eq. 3) and Zhou et al. 2022 write it.

    beta_on_alignment: beta * alignment + commitment instead, which is what the released VQGAN and CodeFormer code
    trains with: there the codebook follows slowly, and the encoder commits at full weight.
    """
    alignment, commitment = alignment_loss(z, codes), commitment_loss(z, codes)
    return beta * alignment + commitment if beta_on_alignment else alignment + beta * commitment


def code_token_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy of the codes' numbers, indices (B, tokens), under logits (B, tokens, codebook size)."""
    return F.cross_entropy(logits.float().transpose(1, 2), indices)
