"""Codebooks: losses of predicting codes, and how all codes are kept in use.

A code that is the nearest one of no latent is never trained, and most codes of a random codebook are like that."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor

from stablesr_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """How the codebook is kept in use."""

    codebook_fit_steps: tuple[int, ...] = ()
    """Before these steps the codebook is fitted to latents of the data by k-means."""
    codebook_revival_steps: int = 0
    """Every n-th step, unused codes are replaced by latents of the data; 0: never."""
    codebook_revival_until: int = 0
    """Last step at which unused codes are replaced."""
    codebook_fit_samples: int = 64
    """Number of pictures whose latents are used for k-means and replacement."""


@torch.no_grad()
def refresh_codebook(
    options: CodebookOptions, codebook: nn.Embedding, step: int, find_latents: Callable[[int], Tensor]
) -> None:
    """If due at this step, fit the codebook to latents, or replace unused codes by latents.

    find_latents: number of pictures -> their latents (N, C). The result depends on latents, codebook and step only, so
    that all processes compute the same. Raises ConfigError if FSDP shards the codebook.
    """
    if isinstance(codebook.weight, DTensor) and (options.codebook_fit_steps or options.codebook_revival_steps):
        raise ConfigError(
            "codebook_fit_steps and codebook_revival_steps need the whole network, which FSDP shards; "
            "use configs/accelerate/eight_gpus.yaml, or leave them out"
        )
    is_fitted = step in options.codebook_fit_steps
    is_revived = options.codebook_revival_steps and step % options.codebook_revival_steps == 0
    if not is_fitted and not (is_revived and 0 < step <= options.codebook_revival_until):
        return
    codes, generator = codebook.weight, torch.Generator().manual_seed(step)
    latents = find_latents(options.codebook_fit_samples).to(codes)
    if is_fitted:
        codes.copy_(fit_codes(latents, len(codes), generator))
    else:
        counts = torch.bincount(torch.cdist(latents, codes).argmin(dim=1), minlength=len(codes))
        codes.copy_(revive_codes(codes, counts, latents, generator))


def fit_codes(latents: Tensor, count: int, generator: Generator, iterations: int = 20) -> Tensor:
    """`count` centres (count, C) of latents (N, C) by k-means (Lloyd 1982), starting from latents drawn at random.

    A centre without latents is replaced by a random latent.
    """
    places = torch.randint(len(latents), (count,), generator=generator).to(latents.device)
    centres = latents[places]
    for _ in range(iterations):
        nearest = torch.cdist(latents, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        centres = revive_codes(centres, counts, latents, generator)
    return centres


def revive_codes(codes: Tensor, counts: Tensor, latents: Tensor, generator: Generator) -> Tensor:
    """Codes (K, C); those with a count (K,) of zero are replaced by random latents (N, C)."""
    places = torch.randint(len(latents), (len(codes),), generator=generator).to(latents.device)
    return torch.where(counts[:, None] > 0, codes, latents[places].to(codes.dtype))


def commitment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean squared distance ``|z - sg(codes)|^2`` of features and codes (B, C, h, w); only z gets a gradient.

    z: features of the LQ picture. codes: of the HQ picture.
    """
    return F.mse_loss(z, codes.detach())


def code_token_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, tokens, codebook size) for the indices of codes (B, tokens)."""
    return F.cross_entropy(rearrange(logits.float(), "b tokens codes -> b codes tokens"), indices)
