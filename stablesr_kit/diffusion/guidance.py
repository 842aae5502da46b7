"""Corrections of a prediction."""

from torch import Tensor


def classifier_free_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Prediction pushed away from the unconditional one (Ho and Salimans 2022); 1 is no guidance."""
    return uncond + guidance_scale * (cond - uncond)
