"""Corrections of a prediction: classifier-free guidance and guidance by a reference latent."""

from torch import Tensor


def classifier_free_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Prediction pushed away from the unconditional one (Ho and Salimans 2022); 1 is no guidance."""
    return uncond + guidance_scale * (cond - uncond)


def reference_guidance(denoised: Tensor, reference: Tensor, lr: float = 0.05, num_steps: int = 1) -> Tensor:
    """Denoised latent after `num_steps` gradient steps on its mean squared distance to a reference latent.

    denoised, reference: (B, C, h, w). The mean is over the batch, the sum over the rest, as in StableSR's face script.
    """
    for _ in range(num_steps):
        denoised = denoised - lr * 2 * (denoised - reference) / denoised.shape[0]
    return denoised
